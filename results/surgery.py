"""Changes the memory of a trained model without any training, and saves it as another run.

    python results/surgery.py cap RUN OUT --tokens=512       no head remembers more than about 512 tokens
    python results/surgery.py transplant RUN OUT --donor=R   A and dt_bias, which decide on forgetting, are
    R's

A head keeps exp(A dt) of its state at each token. A is learnt, dt = softplus(dt_bias + what the token
says): so at an average token it remembers about 1 / (|A| softplus(dt_bias)) tokens. The cap raises |A|
where that is too many."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import run_script, write_whole
from model import load_run


@torch.no_grad()
def cap(model, tokens):
    """-> how many heads it changes"""
    changed = 0
    for block in model.backbone.layers:
        mixer = block.mixer
        least = -torch.log(tokens * F.softplus(mixer.dt_bias))  # of A_log
        changed += (mixer.A_log < least).sum().item()
        mixer.A_log.copy_(torch.maximum(mixer.A_log, least))
    return changed


@torch.no_grad()
def transplant(model, donor):
    for block, other in zip(model.backbone.layers, donor.backbone.layers, strict=True):
        block.mixer.A_log.copy_(other.mixer.A_log)
        block.mixer.dt_bias.copy_(other.mixer.dt_bias)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", choices=["cap", "transplant"])
    parser.add_argument("run", help="run folder to start from; it stays as it is")
    parser.add_argument("out", help="new run folder")
    parser.add_argument("--tokens", type=float, help="longest memory, for cap")
    parser.add_argument("--donor", help="run whose A and dt_bias are taken, for transplant")
    args = parser.parse_args(argv)
    if (args.tokens is None) == (args.operation == "cap") or (args.donor is None) == (
        args.operation != "cap"
    ):
        raise ValueError("cap needs --tokens, transplant needs --donor")
    model, checkpoint = load_run(args.run)
    report = {"operation": args.operation, "run": args.run, "out": args.out}
    if args.operation == "cap":
        report["heads_changed"] = cap(model, args.tokens)
    else:
        transplant(model, load_run(args.donor)[0])
    out = Path(args.out)
    kept = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "kept")}
    write_whole(out / "tokenizer.json", (Path(args.run) / "tokenizer.json").read_text(encoding="utf-8"))
    kept["config"] = asdict(model.config)
    kept["model"] = model.state_dict()
    write_whole(out / "ckpt.pt", lambda file: torch.save(kept, file))
    print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
