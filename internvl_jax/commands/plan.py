"""`internvl-jax plan`: what an experiment needs on a TPU pod, from the TPU compiler."""

import argparse
import json
import os

from internvl_jax import configuration
from internvl_jax.commands import CONFIG_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Compile a config's train step for a TPU pod, without a TPU: memory, traffic, time."""
    modes = ("encode", "prefill", "decode")
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--topology", required=True, help="chip and slice, as v5e:16x16")
    parser.add_argument("--inference", choices=modes, help="plan this call, not the train step")
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument(
        "--suggest", action="store_true", help="rank meshes, chunk counts and remat policies"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--dump", metavar="FILE", help="keep the compiled program's text here")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.plan import chips

        chips.parse(args.topology)  # before anything is loaded
        if args.weights and not args.inference:
            raise configuration.ConfigError("--weights stands with --inference: training is float")
        config = configuration.load(args.config, args.overrides)
        os.environ["JAX_PLATFORMS"] = "cpu"  # the pod's devices exist only in the compiler
        from internvl_jax.plan import plan, suggest

        if args.suggest:
            if args.inference or args.dump:
                raise configuration.ConfigError("--suggest stands without --inference and --dump")
            found = suggest.suggest(config, args.topology)
            for candidate, confirmed in found:
                print(f"\n{candidate.flags}\n{confirmed}")
            answer = found[0][1]
        else:
            answer = plan.make(
                config, args.topology, args.dump, args.inference, args.weights
            )
            print(answer)
        if args.json:
            print(json.dumps(answer.to_dict()))

    return run
