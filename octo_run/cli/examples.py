"""Examples for the help of every command, by the command's words behind ``octo-run``."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "octo-run chat",
        "octo-run pull HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "octo-run chat -m HuggingFaceTB/SmolLM2-1.7B-Instruct --session trip",
        "octo-run doctor",
    ),
    "chat": (
        "octo-run chat",
        "octo-run chat -m ORG/NAME --kv oct3 --ctx 32k",
        "octo-run chat --session trip",
        "octo-run chat --system 'Answer in French.' -p 'Good morning.'",
        "git diff | octo-run chat --single -p 'Describe this change in one sentence.'",
    ),
    "generate": (
        "octo-run generate -p 'Once upon a time' -n 50",
        "octo-run generate --chat -p 'What is in this file?' -f notes.txt",
        "octo-run generate --chat --json-schema schema.json -p 'A user named Ann, aged 31.'",
        "octo-run generate --batch prompts.jsonl -o answers.jsonl --chat",
    ),
    "pull": (
        "octo-run pull HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "octo-run pull https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "octo-run pull ORG/NAME --revision v1.0",
        "HF_TOKEN=hf_... octo-run pull ORG/NAME",
    ),
    "import": (
        "octo-run import model-Q8_0.gguf",
        "octo-run import model-Q8_0.gguf my-model --weights int8",
    ),
    "list": ("octo-run list", "octo-run list --json"),
    "show": ("octo-run show octo-demo", "octo-run show ORG/NAME --json"),
    "rm": ("octo-run rm ORG/NAME", "octo-run rm ORG/NAME@v1.0 --yes"),
    "sessions": ("octo-run sessions list", "octo-run chat --session trip"),
    "sessions list": ("octo-run sessions list", "octo-run sessions list --json"),
    "sessions show": ("octo-run sessions show trip",),
    "sessions rm": ("octo-run sessions rm trip", "octo-run sessions rm trip work --yes"),
    "quantize": ("octo-run quantize ORG/NAME ./my-model-int4 --weights int4",),
    "bench": (
        "octo-run bench",
        "octo-run bench --kv bf16,oct4,oct3 --depth 0,4k --tests pp512,tg128,pg512+128",
        "octo-run bench --random-weights llama-3.1-8b --kv oct3 --output jsonl",
    ),
    "eval": ("octo-run eval ppl --kv oct4,oct3,oct2", "octo-run eval needle --kv oct3 --lengths 2k"),
    "eval ppl": (
        "octo-run eval ppl",
        "octo-run eval ppl --text book.txt --kv oct4,oct3,oct2 --plot ppl.png",
    ),
    "eval needle": (
        "octo-run eval needle --kv oct3,oct2 --lengths 1k,2k",
        "octo-run eval needle --text book.txt --lengths 2k --depths 9 --csv needle.csv",
        "octo-run eval needle --text book.txt --lengths 4k --questions 100 --per-text 10 --distractors 0",
    ),
    "eval tasks": ("octo-run eval tasks tasks.jsonl --kv oct3",),
    "eval codec": ("octo-run eval codec", "octo-run eval codec --plot codec.png"),
    "doctor": ("octo-run doctor", "octo-run doctor --json"),
    "completion": (
        "octo-run completion bash",
        "octo-run completion fish > ~/.config/fish/completions/octo-run.fish",
    ),
}
