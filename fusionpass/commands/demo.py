"""demo: quantise, compile, measure and compare a real language model."""

import argparse
import json
from pathlib import Path

from .options import Commands, count


def add(commands: Commands) -> None:
    """Add the command and its options."""
    demo = commands.add_parser("demo", help="quantise, compile, measure and compare a real language model")
    demo.add_argument("--model", type=Path, metavar="DIR", help="a local Hugging Face model; default: SmolLM2-135M")
    demo.add_argument("--device", help="default: cuda where there is one, else cpu")
    demo.add_argument("--prompt", action="append", help="what to answer; may be given several times")
    demo.add_argument("--tokens", type=count, default=24, help="tokens to generate after each prompt (24)")
    demo.add_argument("--window", type=count, default=256, help="tokens of context (256)")
    demo.add_argument("--numerics", choices=("eager", "fast"), default="eager", help="which roundings to keep (eager)")
    demo.add_argument("--cuda-graphs", choices=("auto", "off"), default="auto", help="as in fusionpass.Config (auto)")
    demo.add_argument("--dump-dir", type=Path, metavar="DIR", help="where graphs and generated code go")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was found as JSON")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; 1 where one of its checks failed."""
    import torch

    from .. import demo

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, name = demo.load(args.model, device)
    print(f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")
    options = demo.Options(
        prompts=tuple(args.prompt or demo.PROMPTS),
        window=args.window,
        new_tokens=args.tokens,
        numerics=args.numerics,
        cuda_graphs=args.cuda_graphs,
        dump_dir=args.dump_dir,
    )
    result = demo.run(model, tokenizer, options)
    if args.json:
        args.json.write_text(json.dumps({"model": name, "device": str(device), **result.to_dict()}, indent=1))
    return 0 if result.passed else 1
