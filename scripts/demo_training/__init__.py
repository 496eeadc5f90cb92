"""What ``train_demo_model.py`` is made of: texts and tokenizer, training rows, the model and its optimizers."""
