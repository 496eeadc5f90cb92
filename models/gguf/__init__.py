"""GGUF files, the format of llama.cpp, made into model folders: `importer.import_model`.

The `gguf` package knows the types of tensors and decodes their blocks. The header is read here (`header`): that package
maps the file, so that one which shrinks would end the process, and believes every count in it.
"""
