"""Training of a GPT-2 in torch, from scratch or from a checkpoint (``gptx train``, extra [train]).

This package alone of gptx imports torch; nothing else of gptx imports this package's modules except
`gptx.training.cli`, which defers them.
"""
