"""train.py with forgetting held fixed: A, dt_bias and the rows of in_proj that make dt stay as they are.

    python results/frozen.py --init_from=out/zero --init_state=prev --out=out/frozen      all flags of
    train.py

What then still repairs a model is not that its memories get shorter.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from data import run_script


def rates(model):
    """The parameters, or parts of them, that decide how fast the heads forget."""
    found = []
    for block in model.backbone.layers:
        mixer = block.mixer
        found += [mixer.A_log, mixer.dt_bias, mixer.in_proj.weight[-mixer.config.nheads :]]
    return found


def make_optimizer(model, device):
    """train.py's, which puts them back after each step: weight decay does not move them either."""
    before = [t.detach().clone() for t in rates(model)]

    @torch.no_grad()
    def put_back(*_):
        for t, old in zip(rates(model), before):
            t.copy_(old)

    optimizer = original(model, device)
    optimizer.register_step_post_hook(put_back)
    return optimizer


if __name__ == "__main__":
    original, train.make_optimizer = train.make_optimizer, make_optimizer
    run_script(train.main)
