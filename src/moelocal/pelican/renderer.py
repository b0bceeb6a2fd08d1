"""Draws one SVG in a process of its own, which `render.py` starts and ends: what an SVG makes a renderer do is not
known before, and a renderer that crashes, hangs or fills the memory must not take anything along.

Run as a file, so that nothing else of the package is imported. Standard input: a JSON object with `svg`, `size` (pixels
of the longer side) and `fonts` (arguments of the renderer); standard output: a PNG. Exit code 3 and one line on
standard error: the renderer refused it.
"""

import json
import sys
from contextlib import suppress

NBYTES = 2 << 30


def main() -> int:
    with suppress(
        ImportError, ValueError, OSError
    ):  # macOS knows no such limit; there the time limit alone holds
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (NBYTES, NBYTES))
    import resvg_py

    asked = json.load(sys.stdin)
    size = {"width": asked["size"], "height": asked["size"]}
    try:
        png = resvg_py.svg_to_bytes(svg_string=asked["svg"], **size, **asked["fonts"])
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 3
    sys.stdout.buffer.write(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
