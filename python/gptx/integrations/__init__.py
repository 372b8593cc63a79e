"""gptx inside other programs: one module for each, which needs that program to be installed."""
