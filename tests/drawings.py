"""What the tests of the pelican share: pictures, and answers around them."""

from __future__ import annotations

from typing import Any

from moelocal.pelican.answers import Answer, key

PELICAN = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">
<g fill="none" stroke="black" stroke-width="2">
<circle cx="25" cy="75" r="16"/>
<circle cx="75" cy="75" r="16"/>
<path d="M25 75 L42 52 L68 52 L50 75 Z M42 52 L50 75 M75 75 L66 46 L73 43"/>
</g>
<ellipse cx="44" cy="38" rx="17" ry="11" fill="white" stroke="black"/>
<path d="M65 12 L92 18 Q78 32 64 18 Z" fill="orange" stroke="black"/>
</svg>"""

RICH = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="200px" height='100'>
  <!-- sky & <circle r="9"/> --><title>A pelican</title>
  <defs><linearGradient id="sky" x1="0"><stop offset="0" stop-color="#def"/><stop offset="1" stop-color="#9cf"/>
    </linearGradient><clipPath id="c"><rect width="90" height="90"/></clipPath>
    <g id="wheel"><circle r="9" fill="none" stroke="#333"/></g></defs>
  <style><![CDATA[ .body { fill: white; stroke: #222 } /* feathers */ ]]></style>
  <rect width="200" height="100" fill="url(#sky)"/>
  <g clip-path="url(#c)"><ellipse class="body" cx="50" cy="40" rx="20" ry="12" transform="rotate(-5 50 40)"/></g>
  <use xlink:href="#wheel" x="30" y="80"/><use href="#wheel" x="80" y="80"/>
  <text x="5" y="95" font-family="Arial, sans-serif">P&#233;lican &amp; bike &gt; car</text>
</svg>"""


def answer(model: str = "one", seed: int | None = 1, text: str = PELICAN, **changes: Any) -> Answer:
    """An answer of a model to a prompt."""
    prompt = changes.pop("prompt", "Draw a pelican")
    fields: dict[str, Any] = {
        "key": key("moelocal", model, prompt, seed, {}),
        "model": model,
        "source": "moelocal",
        "origin": f"weights of {model}",
        "quantization": "4.50 bits per weight",
        "prompt": prompt,
        "seed": seed,
        "settings": {},
        "text": text,
        "reasoning": "",
        "finish_reason": "stop",
        "tokens": 391,
        "seconds": 2.5,
        "tokens_per_second": 160.0,
        "machine": "a chip",
        "date": "2026-01-02T03:04:05Z",
    }
    return Answer(**(fields | changes))
