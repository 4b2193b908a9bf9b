"""`internvl-jax data filter`: the list of records that the rules keep."""

import argparse
import dataclasses
import json

from internvl_jax.commands import Run

BEAM_HELP = "a flag of Apache Beam, as --beam=--runner=FlinkRunner; may be given several times"


def build(parser: argparse.ArgumentParser) -> Run:
    """Filter scored records by the rules of stage 1 or 2, with Apache Beam."""
    from internvl_jax.data.curate import rules

    parser.add_argument("scores", metavar="FOLDER", help="score files of `data score`")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="list for ?keep=")
    parser.add_argument(
        "--rules", default="stage1", help="stage1, stage2 or both; default: %(default)s"
    )
    for field in dataclasses.fields(rules.Stage1):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default,
            help="default: %(default)s",
        )
    parser.add_argument("--beam", action="append", default=[], metavar="FLAG", help=BEAM_HELP)

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data.curate import pipelines

        wanted = [word.strip() for word in args.rules.split(",")]
        if unknown := set(wanted) - set(rules.RULES):
            raise ValueError(f"unknown rules {', '.join(unknown)}; use {', '.join(rules.RULES)}")
        names = [field.name for field in dataclasses.fields(rules.Stage1)]
        stage1 = rules.Stage1(**{name: getattr(args, name) for name in names})
        show(
            pipelines.filter_records(args.scores, args.out, wanted, stage1, args.beam), args.json
        )

    return run


def show(figures: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    print("kept {kept} of {records} records".format(**figures))
    for cause, count in sorted(figures["removed"].items(), key=lambda item: -item[1]):
        print(f"{count:10} {cause}")
