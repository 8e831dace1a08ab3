"""LLaMA in Flax NNX."""

from models.config import PRESETS as PRESETS
from models.config import LlamaConfig as LlamaConfig
from models.llama import Llama as Llama
