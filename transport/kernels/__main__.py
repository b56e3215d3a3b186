"""The process that compiles for another one: `python -m transport.kernels PID >FILE`.

It ends with the process PID, its parent, for which nobody else could use what it makes.
"""

import gc
import sys

from transport.kernels.processes import end_with


def main() -> None:
    end_with(int(sys.argv[1]))
    # Not before: numba takes a while.
    from transport.kernels.compiler import compile_image

    gc.disable()  # what the compiler makes stays until its end; looking for garbage takes 6 %
    sys.stdout.buffer.write(compile_image().to_bytes())


if __name__ == "__main__":
    main()
