"""The engine process as it is, over the fake core: `python -m benchmarks.overhead.engine --listen ADDR --ids FILE …`.

It serves the demo model's tokenizer and template under the name that the shim's default configuration asks for, with
windows so large that a reply can go on for as long as a measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from aiexport_edge.proto import grpc_polling

os.environ.update(grpc_polling.ENVIRONMENT)  # before gRPC is imported

import uvloop

from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.engine.server import logs
from aiexport_edge.engine.server.listener import ListenerConfig
from aiexport_edge.engine.server.process import ServerConfig, serve
from aiexport_edge.proto.lifetime import die_with_parent

MODEL = "demo"
WINDOW = 1 << 22
QUEUE_SIZE = 4096


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--directory", type=Path, required=True, help="where tokenizer and template are")
    parser.add_argument("--ids", required=True, help="the core's")
    parser.add_argument("--reports", required=True, help="the core's")
    arguments = parser.parse_args()
    core = [sys.executable, str(Path(__file__).with_name("core.py"))]
    core += ["--ids", arguments.ids, "--reports", arguments.reports]
    config = CoreConfig(
        models=[CoreModel(MODEL, "", "auto", WINDOW, deterministic=True, revision="overhead")],
        device="cpu",
        page_bytes=0,
        pool_bytes=0,
        max_num_running=QUEUE_SIZE,
        max_step_tokens=1 << 16,
        num_threads=1,
        batch_floor_share=0.0,
    )
    facts = ModelFacts(MODEL, arguments.directory, "overhead", 1 << 18, WINDOW, WINDOW // 2, True, ())
    server = ServerConfig(
        listener=ListenerConfig(arguments.listen),
        models=[facts],
        queue_size=QUEUE_SIZE,
        tenant_queue_share=1.0,
        drain_s=0.0,
    )
    logs.set_up("info", "text")
    uvloop.run(serve(server, NativeBackend(config, command=core)))


if __name__ == "__main__":
    main()
