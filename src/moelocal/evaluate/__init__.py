"""What a quantization cost in quality: how far its next-token distributions are from those of the original weights.

from moelocal.evaluate import evaluate
quality = evaluate("./Qwen3.6-35B-A3B-balanced", "Qwen/Qwen3.6-35B-A3B")
print(quality.kl_mean.value, quality.top1.value)
"""

from moelocal.evaluate.quality import Part, Quality, Weights, evaluate
from moelocal.evaluate.statistics import Estimate

__all__ = ["Estimate", "Part", "Quality", "Weights", "evaluate"]
