"""The names of transformers, for scripts that were written for it.

>>> from gptx.hf import AutoModelForCausalLM, AutoTokenizer   # instead of: from transformers import
>>> tokenizer = AutoTokenizer.from_pretrained("gpt2/")
>>> model = AutoModelForCausalLM.from_pretrained("gpt2/")
>>> inputs = tokenizer("Once upon a time", return_tensors="pt")
>>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))

Arguments and defaults are those of transformers 5; greedy tokens too. Arrays are numpy's, or
torch's where the script has imported torch. What gptx does not have is refused by its name.
"""

from gptx.hf.config import AutoConfig, GPT2Config
from gptx.hf.encoding import BatchEncoding
from gptx.hf.generation_config import GenerationConfig
from gptx.hf.modeling import AutoModelForCausalLM, GPT2LMHeadModel
from gptx.hf.pipeline import TextGenerationPipeline, pipeline
from gptx.hf.processors import LogitsProcessor, LogitsProcessorList
from gptx.hf.seed import set_seed
from gptx.hf.stopping import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from gptx.hf.streamers import TextIteratorStreamer, TextStreamer
from gptx.hf.tokenizer import AutoTokenizer, GPT2Tokenizer, GPT2TokenizerFast

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "EosTokenCriteria",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GenerationConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextGenerationPipeline",
    "TextIteratorStreamer",
    "TextStreamer",
    "pipeline",
    "set_seed",
]
