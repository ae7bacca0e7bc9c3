"""When Ray itself takes notice: a line with how many nodes it calls alive, each time that changes."""

import json
import logging
import time

import ray


def main() -> None:
    """Watch the cluster of RAY_ADDRESS, until killed."""
    ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    before = -1
    while True:
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive != before:
            print(json.dumps({"alive": alive, "mono": time.monotonic()}), flush=True)
        before = alive
        time.sleep(0.1)


if __name__ == "__main__":
    main()
