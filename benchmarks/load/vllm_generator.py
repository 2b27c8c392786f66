"""`vllm bench serve` kept running: its own parser and its own `main_async`, once for each line of standard input.

`generator` starts this script under the engines' Python. Importing vllm takes several seconds of CPU, which a run of a
hundred loads would spend a hundred times; and the CPU build's `vllm` command refuses to start at all.

A line of input is {"do": "load" | "prompts", "arguments": [...], "out": FILE}; a line of output is {"error": null or a
text}.
"""

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

_KEPT = ("duration", "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "errors")


def mended(handler: type[Any]) -> type[Any]:
    """vLLM's reader of streamed answers (`handler`), fixed for streams with SSE comments, which pad our answers.

    vLLM strips white space from each piece that it reads from the network. If a piece ends with a comment, this removes
    the comment's end: the next event becomes part of the comment and is dropped, and the answer seems to have no
    tokens. No comment of padding continues with "data: " or ":", so these begin something new.
    """

    class Mended(handler):  # type: ignore[misc]  # The class is only known under the engines' Python.
        buffer: str

        def add_chunk(self, chunk_bytes: bytes) -> list[str]:
            if self.buffer.startswith(":") and chunk_bytes.startswith((b"data: ", b":")):
                self.buffer = ""
            found: list[str] = super().add_chunk(chunk_bytes)
            return found

    return Mended


def main() -> None:
    """Works until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # vllm's own output must not be taken for an answer.
    os.dup2(2, 1)
    import numpy
    from vllm.benchmarks.datasets import get_samples
    from vllm.benchmarks.lib import endpoint_request_func
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.tokenizers import get_tokenizer
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    endpoint_request_func.StreamedResponseHandler = mended(endpoint_request_func.StreamedResponseHandler)
    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    answers.write(json.dumps({"error": None}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        error = None
        try:
            arguments = parser.parse_args(job["arguments"])
            if job["do"] == "prompts":
                arguments.random_input_len = arguments.input_len or arguments.random_input_len
                arguments.random_output_len = arguments.output_len or arguments.random_output_len
                random.seed(arguments.seed)
                numpy.random.seed(arguments.seed)  # As main_async does.
                samples = get_samples(arguments, get_tokenizer(arguments.tokenizer))
                result: Any = [item.prompt for item in samples]
            else:
                found = asyncio.run(main_async(arguments))
                result = {name: found.get(name) for name in _KEPT}
            Path(job["out"]).write_text(json.dumps(result))
        except (Exception, SystemExit) as caught:  # Any failure is reported to the other side.
            error = f"{type(caught).__name__}: {caught}"
        answers.write(json.dumps({"error": error}) + "\n")


if __name__ == "__main__":
    main()
