"""Integrations: loops that a framework owns, played as ftkit's steps.

* `updates`: the step loop turned inside out, one update at a time
* `alone`: a launcher's variables hidden from a framework, which is to believe it is alone
* `huggingface`, `lightning`, `accelerate`: the frameworks, each with its own extra
* `ray_train`: jobs whose nodes are the workers of Ray Train

Each imports its framework when it is imported itself, and not before.
"""
