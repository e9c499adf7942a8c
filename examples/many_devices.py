"""Trains a language model on the devices of several processes, its vocabulary divided among them.

    python examples/many_devices.py                # two processes here, with four devices each
    python examples/many_devices.py --drill die    # what happens when one of them dies
    python examples/many_devices.py --help         # other sizes, steps, seeds, limits

Needs `pip install -e ".[examples]"`, and half a minute on two cores. The processes train for half
of the steps, save their state with Orbax and end. Others restore it and train to the end. Then this
process trains the same model from its start on one device, and compares the last loss. What each
device has of the model says sharded_training.py.
"""

import argparse
import asyncio
import functools
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import jax
import language_model
import numpy as np
import orbax.checkpoint as ocp
from sharded_training import mesh_of, training

BATCH, RATE = 8, 0.01
TOLERANCE = 1e-5  # of the last loss, relative: what training makes of rounding

# ---------------------------------------------------------------------------------- one process


def work(args: argparse.Namespace) -> None:
    """One of the processes: trains from the last state saved to `args.until`, and saves there.

    No wait of it is without end: JAX ends a process when another one was not heard of for half of
    `args.timeout`, and the one that started it ends it when all are silent for the whole of it.
    """
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Gloo writes to standard output: into the log, with the errors
    say = functools.partial(print, file=own, flush=True)
    limit = max(1, args.timeout // 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{args.port}",
        num_processes=args.processes,
        process_id=args.process,
        initialization_timeout=limit,
        heartbeat_timeout_seconds=limit,
        shutdown_timeout_seconds=limit,
    )
    with np.load(args.directory / "text.npz") as text:
        frequency, batches = text["frequency"], text["batches"]
    mesh = mesh_of(args.data, jax.device_count() // args.data, args.processes)
    init, step, place, shapes = training(frequency, RATE, args.steps, args.seed, mesh)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager((args.directory / "states").resolve(), options=options) as states:
        start = states.latest_step() or 0
        if start:
            state = states.restore(start, args=ocp.args.StandardRestore(shapes))
            say(f"restored the state after {start} steps")
        else:
            state = init()
        words = state.params["words"]
        part = words.sharding.shard_shape(words.shape)
        say(f"each of {jax.device_count()} devices has {part[0]:,} of {len(words):,} vectors")
        for i in range(start, args.until):
            if args.drill and 0 < start < i and args.process == args.processes - 1:
                os.kill(os.getpid(), signal.SIGKILL if args.drill == "die" else signal.SIGSTOP)
            state, value = step(state, place(batches[i]))
            say(f"step {i} loss {float(value):.9g}")
        states.save(args.until, args=ocp.args.StandardSave(state))
        say(f"saved the state after {args.until} steps")


# ------------------------------------------------------------- the process that starts the others


class Failed(Exception):
    """One of the processes has ended with an error, or all were silent for too long."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


async def started(args: argparse.Namespace, until: int) -> dict[int, float]:
    """Runs as many processes as wanted until they have trained `until` steps.

    Returns:
        The loss of each step.

    Raises:
        Failed: at most `args.timeout` seconds after a process has died or has ceased to go on. No
            process that was started is left.
    """
    loop = asyncio.get_running_loop()
    command = [sys.executable, __file__, *sys.argv[1:], "--until", str(until)]
    command += ["--directory", str(args.directory), "--port", str(free_port())]
    logs = [args.directory / f"process-{i}.log" for i in range(args.processes)]
    losses: dict[int, float] = {}
    ended: list[str] = []
    workers = []

    async def attend(i: int, worker: asyncio.subprocess.Process, silence: asyncio.Timeout) -> None:
        async for line in worker.stdout:
            if not ended:  # else the others have the time that is left to end
                silence.reschedule(loop.time() + args.timeout)
            said = line.decode(errors="replace").rstrip()
            if i == 0:
                print(f"  {said}", flush=True)
                if found := re.fullmatch(r"step (\d+) loss (\S+)", said):
                    losses[int(found[1])] = float(found[2])
        if code := await worker.wait():
            ended.append(f"process {i} {described(code, logs[i])}")

    try:
        for i, log in enumerate(logs):
            with log.open("wb") as file:
                worker = await asyncio.create_subprocess_exec(
                    *command, "--process", str(i), stdout=asyncio.subprocess.PIPE, stderr=file
                )
            workers.append(worker)
        print(f"processes {', '.join(str(worker.pid) for worker in workers)}", flush=True)
        async with asyncio.timeout(args.timeout) as silence:
            await asyncio.gather(*(attend(i, w, silence) for i, w in enumerate(workers)))
    except TimeoutError:
        left = [str(i) for i, worker in enumerate(workers) if worker.returncode is None]
        silent = f"still there after {args.timeout} seconds of silence, and was ended"
        ended.append(f"process {', '.join(left)} was {silent}")
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
    if ended:
        raise Failed("\n  ".join(ended))
    return losses


def described(code: int, log: Path) -> str:
    """How a process has ended, and the first error that it wrote."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    # Of Python, or of the service by which JAX keeps watch over the processes.
    error = r"^\S*Error: .*|(?<=absl::Status: ).*\n.*"
    found = re.search(error, log.read_text(errors="replace"), re.MULTILINE)
    return f"{how}: {' '.join(found[0].split())}" if found else how


def prepared(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Writes down for the processes how frequent each word is, and the batches."""
    texts = language_model.library(args.files)
    vocabulary = language_model.frequent(texts)
    words = language_model.encoded(texts, vocabulary)
    rng = np.random.default_rng(args.seed)
    batches = language_model.batches(rng, words, args.steps, BATCH)
    frequency = np.bincount(words, minlength=len(vocabulary)) / len(words)
    np.savez(args.directory / "text.npz", frequency=frequency, batches=batches)
    print(f"{len(words):,} words of text, {len(vocabulary):,} in the vocabulary", flush=True)
    return frequency, batches


def on_one_device(args: argparse.Namespace, frequency: np.ndarray, batches: np.ndarray) -> float:
    """The last loss of the same training in this process alone."""
    jax.config.update("jax_platforms", "cpu")
    init, step, place, _ = training(frequency, RATE, args.steps, args.seed)
    state = init()
    for batch in batches:
        state, value = step(state, place(batch))
    return float(value)


def compare(args: argparse.Namespace) -> int:
    """Trains on many devices and on one; the code to exit with."""
    states = args.directory / "states"
    saved = max((int(path.name) for path in states.glob("*") if path.name.isdigit()), default=0)
    if saved >= args.steps:
        print(f"{states} has a state after {saved} steps already; wanted: fewer than {args.steps}")
        return 1
    frequency, batches = prepared(args)
    losses = {}
    for until in (args.steps // 2, args.steps):
        if saved < until:
            try:
                losses |= asyncio.run(started(args, until))
            except Failed as error:
                print(f"failed: {error}\nlogs and saved states: {args.directory}", flush=True)
                return 1
    many, one = losses[args.steps - 1], on_one_device(args, frequency, batches)
    difference = abs(many - one) / one
    print(f"last loss on {args.processes} × {args.devices} devices: {many:.9g}")
    print(f"last loss on one device:    {one:.9g}, a difference of {difference:.0e}")
    return int(not difference < TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--processes", default=2)
    number("--devices", default=4, help="of each process (default: 4)")
    number("--data", default=2, help="devices that divide a batch (default: 2)")
    number("--steps", default=24)
    number("--seed", default=0)
    number("--files", default=1, help="read one in N files of the library (default: all)")
    number("--timeout", default=60, help="seconds of silence before all is ended (default: 60)")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="keep states there, and go on from the last"
    )
    parser.add_argument(
        "--drill", choices=["die", "stall"], help="let the last process do so after a restore"
    )
    for name in ("--process", "--port", "--until"):  # of the processes that this one starts
        number(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.devices % args.data or BATCH % args.data:
        parser.error(f"--data must divide --devices and {BATCH} sequences, got {args.data}")
    if args.process is not None:
        try:
            work(args)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # at once: at a usual exit JAX would wait for the others
        return
    kept = args.directory is not None
    args.directory = args.directory or Path(tempfile.mkdtemp())
    args.directory.mkdir(parents=True, exist_ok=True)
    code = compare(args)
    if code == 0 and not kept:  # what has failed can be looked at
        shutil.rmtree(args.directory)
    sys.exit(code)


if __name__ == "__main__":
    main()
