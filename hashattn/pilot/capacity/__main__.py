"""Is a pilot worth it? python -m hashattn.pilot.capacity --model FOLDER --context 128K"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from hashattn.base.errors import HashAttnError
from hashattn.base.files import write_json
from hashattn.base.layout import LAYOUTS
from hashattn.pilot.capacity.devices import DEVICES, THIS_MACHINE, device_named
from hashattn.pilot.capacity.machine import Measurement, MeasurementError, measure
from hashattn.pilot.capacity.preflight import preflight
from hashattn.pilot.capacity.result import Workload, tokens_of_text
from hashattn.pilot.capacity.shapes import ModelShape, model_shape, read_config
from hashattn.pilot.capacity.speed import Speed
from hashattn.pilot.capacity.wording import summary
from hashattn.pilot.settings import LANGUAGES


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 for a verdict, whichever; 1 failed (the reason is on stderr); 2 usage."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (HashAttnError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    # what is asked is checked before anything is read or measured
    requests = options.requests_per_day
    if options.tokens_per_day is not None:
        requests = options.tokens_per_day / max(1, options.new_tokens)
    workload = Workload(
        options.context, options.batch, options.new_tokens, requests,
        options.price, options.currency, options.days,
    )  # fmt: skip
    device = device_named(options.device)
    config = read_config(options.model)
    model = model_shape(config, dtype=options.dtype, weight_bits=options.weight_bits)
    settings = {"budget": options.budget, "bits": options.bits, "lists": options.lists}
    measured = None
    if device.bandwidth is None:
        measured = _measurement(model, options.measurement, settings)
    result = preflight(
        model, workload, device, **settings, measured=measured, fixed_us=options.fixed_us
    )
    print(summary(result, options.language))
    if options.json:
        write_json(options.json, result.to_dict())


def _measurement(model: ModelShape, path: Path | None, settings: dict) -> Measurement:
    """The measurement kept in a file, if it is of these shapes and settings; else a new one, which
    the file then keeps."""
    Speed(model, device_named(next(iter(DEVICES))), **settings)  # refuses settings before measuring
    if path is not None and path.exists():
        kept = Measurement.load(path)
        try:
            kept.check(model, **settings)
            return kept
        except MeasurementError as problem:
            print(problem, file=sys.stderr)
    print("timing this machine's kernels, some seconds ...", file=sys.stderr)
    measured = measure(model, **settings)
    if path is not None:
        measured.save(path)
    return measured


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hashattn.pilot.capacity", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder, config.json, or hub id in the local cache")
    add("--context", required=True, type=_tokens, help="tokens: 131072, or 128K")
    add("--batch", type=int, default=1, help="sequences decoded together")
    add("--device", default=THIS_MACHINE, help=f"{THIS_MACHINE} (timed) or {', '.join(DEVICES)}")
    add("--budget", type=_fraction, default=1 / 16, help="attended / cached tokens: 1/16, .0625")
    add("--bits", type=int, default=64, help="of a key's code per KV head")
    add("--lists", default="per_query_head", choices=LAYOUTS, help="lists of tokens")
    add("--fixed-us", type=float, help="microseconds that a sparse layer takes beside its bytes")
    add("--dtype", help="of weights and cache; by default the model's")
    add("--weight-bits", type=float, help="of quantised weights, e.g. 4")
    add("--new-tokens", type=int, default=256, help="of an answer")
    traffic = parser.add_mutually_exclusive_group()
    traffic.add_argument("--requests-per-day", type=float, help="for the cost")
    traffic.add_argument("--tokens-per-day", type=float, help="answer tokens, for the cost")
    add("--price", type=float, help="of one device for an hour")
    add("--currency", default="USD")
    add("--days", type=int, default=30, help="that the cost is for")
    add("--language", default="en", choices=LANGUAGES)
    add("--measurement", type=Path, help="file that keeps this machine's times")
    add("--json", type=Path, help="file for all of it as JSON")
    return parser


def _tokens(text: str) -> int:
    """`tokens_of_text` for argparse."""
    try:
        return tokens_of_text(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def _fraction(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from problem


if __name__ == "__main__":
    sys.exit(main())
