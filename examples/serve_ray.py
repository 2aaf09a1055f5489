"""Serves a checkpoint on many machines with Ray Serve: replicas, each with an engine of its own.

    pip install "hf_adaptive[serve,ray]"
    python examples/serve_ray.py FOLDER_OR_HUB_NAME --replicas 1 8 --port 8000
    curl http://127.0.0.1:8000/ -d '{"inputs": "A masterpiece."}'

Requests and answers are those of `python -m hf_adaptive.serving`. Replicas are added while more requests wait in each
engine than `--target`, and taken away when fewer do; Ray replaces one that dies. Each machine has to reach the
checkpoint: a Hub name, or a folder on a shared disk. Ray listens on loopback unless --host says otherwise.
"""

import argparse

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from hf_adaptive.serving import ExitsEngine
from hf_adaptive.serving.api import Limits
from hf_adaptive.serving.loading import load_for_serving
from hf_adaptive.serving.server import Service, answer_request

# Requests that Ray hands to one replica; the engine itself refuses later.
MOST_AT_A_REPLICA = 5000


@serve.deployment(max_ongoing_requests=MOST_AT_A_REPLICA)
class Classifier:
    """A replica.

    Args:
        path (`str`): Folder or Hub name.
        device (`str`): Where the model is run.
    """

    def __init__(self, path: str, device: str):
        model, tokenizer = load_for_serving(path, device=device)
        self.service = Service(
            lambda: ExitsEngine(model, tokenizer=tokenizer, max_waiting=2 * MOST_AT_A_REPLICA), path, Limits()
        )

    async def __call__(self, request: Request) -> Response:
        """Answers one request; rows of all that are here are regrouped at every exit."""
        return await answer_request(request, self.service)

    def check_health(self) -> None:
        """Ray replaces a replica whose check fails."""
        if not self.service.engine.is_alive:
            raise RuntimeError("the engine's worker died")


def application(path: str, least: int, most: int, target: int, device: str = "cpu") -> serve.Application:
    """What Ray Serve runs.

    Args:
        path (`str`): Folder or Hub name.
        least, most (`int`): Replicas.
        target (`int`): Requests that should wait at each replica.
        device (`str`): Where the model is run: `cuda` gives each replica a GPU.
    """
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
    resources = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": 1}
    deployment = Classifier.options(autoscaling_config=scaling, ray_actor_options=resources)
    return deployment.bind(path, device)


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 4), metavar=("LEAST", "MOST"))
    parser.add_argument("--target", type=int, default=32, help="requests that should wait at each replica")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    serve.start(http_options={"host": asked.host, "port": asked.port})
    serve.run(application(asked.model, *asked.replicas, asked.target, asked.device), blocking=True)


if __name__ == "__main__":
    main()
