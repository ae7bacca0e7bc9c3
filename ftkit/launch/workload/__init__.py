"""The bundled training job: a byte-level GPT on real text, used by drills and benchmarks."""
