#!/usr/bin/env python3
"""The PyTorch peer of `anneal bench step`: one DiT, its full training step, timed.

What: forward, loss, backward, AdamW (fused) and EMA (foreach) of `dit_model.DiT` on random data of a fixed seed; also forward
alone, whole sampling runs, and attention alone. `--check GOLDEN` proves that the model is the published one;
`--train-digits` trains on real digits.
Contract: prints one line, and one JSON object with `--json`, with median step time, images a second, peak memory and, from the
start of the process, the time to the first finished step. On CUDA, bf16 is autocast over fp32 weights in training and weights
kept in bf16 in sampling, what stays in fp32 multiplies in TF32, and times come from events in the stream.
Not done: several devices, data loading in the timed step, gradient accumulation.
"""

import argparse
import ctypes
import json
import os
import statistics
import time


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    size = p.add_argument_group("model")
    size.add_argument("--model", help="a preset such as DiT-S/2; the four sizes below override it")
    size.add_argument("--hidden", type=int)
    size.add_argument("--depth", type=int)
    size.add_argument("--heads", type=int)
    size.add_argument("--patch", type=int)
    size.add_argument("--image-size", type=int, default=32, help="side of the (latent) image")
    size.add_argument("--channels", type=int, default=4)
    size.add_argument("--classes", type=int, default=1000)
    size.add_argument("--learn-sigma", action=argparse.BooleanOptionalAction, default=True)
    size.add_argument("--loss", choices=["vlb", "mse"], help="vlb where sigma is learned, else mse, when left out")
    run = p.add_argument_group("run")
    run.add_argument("--mode", choices=["step", "forward", "sample", "attention"], default="step")
    run.add_argument("--batch", type=int, default=8)
    run.add_argument("--steps", type=int, default=12, help="timed steps (sampled batches in mode sample)")
    run.add_argument("--warmup", type=int, default=3)
    run.add_argument("--sampling-steps", type=int, default=50, help="DDIM steps of one sampled batch")
    run.add_argument("--guidance", type=float, default=4.0)
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 runs under autocast, weights stay fp32")
    run.add_argument("--tf32", action="store_true", help="let fp32 matrix products use TF32 on CUDA; with bf16 they do anyway")
    run.add_argument("--attention", type=lambda text: tuple(map(int, text.split(","))), nargs="+", default=[(64, 16, 256, 72)],
                     metavar="BATCH,HEADS,TOKENS,WIDTH", help="shapes of mode attention")
    run.add_argument("--sdpa", choices=["default", "cudnn", "flash", "efficient", "math"], default="default",
                     help="which of PyTorch's attention kernels; by default PyTorch chooses")
    run.add_argument("--compile", action="store_true", help="torch.compile of model and loss")
    run.add_argument("--cuda-graph", action="store_true", help="torch.compile with mode=reduce-overhead")
    run.add_argument("--arena", action="store_true", help="glibc keeps freed memory (a tuned user's malloc settings), CPU only")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--json", action="store_true")
    p.add_argument("--check", metavar="GOLDEN", nargs="+", help="compare with golden files and exit")
    digits = p.add_argument_group("digits")
    digits.add_argument("--train-digits", metavar="NPZ", help="train on images of this npz, sample, write --out")
    digits.add_argument("--out", default="samples.npz")
    digits.add_argument("--lr", type=float, default=1e-3)
    digits.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant")
    digits.add_argument("--lr-warmup", type=int, default=0)
    digits.add_argument("--beta2", type=float, default=0.999)
    digits.add_argument("--weight-decay", type=float, default=0.0)
    digits.add_argument("--clip-norm", type=float, default=0.0)
    digits.add_argument("--ema", type=float, nargs="+", default=[0.995], help="the first rate is sampled unless --sample-all-ema")
    digits.add_argument("--label-drop", type=float, default=0.1)
    digits.add_argument("--objective", choices=["epsilon", "v", "flow"], default="epsilon")
    digits.add_argument("--betas", choices=["linear", "squaredcos"], default="linear")
    digits.add_argument("--time", choices=["uniform", "logit-normal"], default="uniform", help="of the flow objective")
    digits.add_argument("--samplers", nargs="*", default=["ddim:100"],
                        help="NAME:STEPS[:clip], NAME ddim ddim_eta1 ddpm dpm++ euler heun; none draw no samples")
    digits.add_argument("--save-at", type=int, nargs="+", default=[], help="sample at these steps too")
    digits.add_argument("--per-class", type=int, default=50)
    digits.add_argument("--losses", metavar="JSON", help="write the loss of every step, a list of numbers")
    return p.parse_args()


def model_sizes(arguments) -> dict:
    from dit_model import preset

    sizes = preset(arguments.model) if arguments.model else {}
    for name in ("hidden", "depth", "heads", "patch"):
        if getattr(arguments, name) is not None:
            sizes[name] = getattr(arguments, name)
    missing = [name for name in ("hidden", "depth", "heads", "patch") if name not in sizes]
    if missing:
        raise SystemExit(f"no size for {', '.join(missing)}: give --model or --hidden --depth --heads --patch")
    for name in ("image_size", "channels", "classes", "learn_sigma"):
        sizes[name] = getattr(arguments, name)
    return sizes


def status_mib(key: str) -> float:
    """A line of /proc/self/status in MiB: VmHWM is the peak, VmRSS the present resident size."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def keep_freed_memory():
    """mallopt: no mmap for large blocks and no trimming, so that a step reuses the pages of the step before."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, 2**31 - 1)


class Trainer:
    """Model, its EMA copy and fused AdamW; `step(x, t, y, noise)` is one full training step and returns the loss tensor."""

    def __init__(self, model, schedule, *, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, ema=(0.9999,),
                 objective="epsilon", clip_norm=0.0, autocast=None, compile_mode=None):
        import contextlib

        import torch
        from diffusion import diffusion_losses, flow_losses

        self.torch, self.model, self.schedule, self.rates, self.clip_norm = torch, model, schedule, ema, clip_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadows = [[p.detach().clone() for p in self.parameters] for _ in ema]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.autocast = autocast or contextlib.nullcontext

        def loss_of(x, t, y, noise):
            losses = (flow_losses(model, x, t, y, noise) if objective == "flow"
                      else diffusion_losses(model, schedule, x, t, y, noise, objective))
            return losses["loss"].mean()

        self.loss_of = compiled(torch, loss_of, compile_mode)
        self.graphed = compile_mode == "reduce-overhead"

    def step(self, x, t, y, noise):
        if self.graphed:
            self.torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            loss = self.loss_of(x, t, y, noise)
        loss.backward()
        if self.clip_norm:
            self.torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with self.torch.no_grad():
            for rate, shadow in zip(self.rates, self.shadows):
                self.torch._foreach_lerp_(shadow, self.parameters, 1 - rate)
        return loss.detach()


def build(arguments):
    """-> (torch, model, schedule, autocast factory) on the asked device."""
    import torch
    from diffusion import Schedule, beta_schedule
    from dit_model import DiT

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.tf32 or (arguments.device == "cuda" and arguments.dtype == "bf16"):
        torch.set_float32_matmul_precision("high")
    model = DiT(**model_sizes(arguments)).to(arguments.device)
    schedule = Schedule(beta_schedule(arguments.betas, 1000), arguments.device)
    autocast = None
    if arguments.dtype == "bf16":
        autocast = lambda: torch.autocast(arguments.device, torch.bfloat16)  # noqa: E731
    return torch, model, schedule, autocast


def compiled(torch, function, mode):
    return torch.compile(function, mode=mode, dynamic=False) if mode else function


def compile_mode_of(arguments):
    return "reduce-overhead" if arguments.cuda_graph else "default" if arguments.compile else None


def compile_cache_use():
    """How many compiled graphs came from Inductor's cache on disk and how many had to be compiled."""
    from torch._dynamo.utils import counters

    graphs = counters["inductor"]
    return {"hits": graphs["fxgraph_cache_hit"], "misses": graphs["fxgraph_cache_miss"], "bypassed": graphs["fxgraph_cache_bypass"]}


def step_work(arguments, torch, model, schedule, autocast):
    """-> a callable that runs one training step on fresh draws (timesteps, noise, label drop), as a real step does."""
    plain = arguments.loss == "mse" or not arguments.learn_sigma
    if plain and arguments.learn_sigma:
        raise SystemExit("--loss mse trains no variance: add --no-learn-sigma")
    if arguments.loss == "vlb" and not arguments.learn_sigma:
        raise SystemExit("--loss vlb needs --learn-sigma")
    trainer = Trainer(model, schedule, autocast=autocast, compile_mode=compile_mode_of(arguments))
    shape = (arguments.batch, arguments.channels, arguments.image_size, arguments.image_size)
    x = torch.randn(shape, device=arguments.device)
    y = torch.randint(arguments.classes, (arguments.batch,), device=arguments.device)

    def work():
        t = torch.randint(1000, (arguments.batch,), device=x.device)
        dropped = torch.where(torch.rand(arguments.batch, device=x.device) < 0.1, arguments.classes, y)
        return trainer.step(x, t, dropped, torch.randn_like(x))

    return work


def inference_work(arguments, torch, model, schedule, autocast):
    """-> a callable that runs one forward, or draws one batch in `count` steps of DDIM (all of them when left out)."""
    import contextlib

    from diffusion import guided, sample

    model.eval().requires_grad_(False)
    if autocast and arguments.device == "cuda":
        model.bfloat16()
    network = compiled(torch, model, compile_mode_of(arguments))
    shape = (arguments.batch, arguments.channels, arguments.image_size, arguments.image_size)
    x = torch.randn(shape, device=arguments.device)
    y = torch.randint(arguments.classes, (arguments.batch,), device=arguments.device)
    t = torch.randint(1000, (arguments.batch,), device=arguments.device)
    steered = guided(network, arguments.classes, arguments.guidance)

    def work(count=None):
        with torch.no_grad(), (autocast or contextlib.nullcontext)():
            if arguments.mode == "forward":
                return network(x, t, y)
            return sample(steered, schedule.respaced(count or arguments.sampling_steps, arguments.device), x, y)

    # A few denoising steps compile all that a run needs.
    work.warm_up = lambda: work(3)
    return work


def seconds_since_start() -> float:
    """Since the process was started, as the kernel counts."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - started


def time_on_cpu(work, warmup, steps):
    """-> milliseconds of each step, the last step's result, seconds to the end of the first step."""
    milliseconds, out, first = [], None, None
    for _ in range(warmup + steps):
        start = time.perf_counter()
        out = work()
        milliseconds.append((time.perf_counter() - start) * 1e3)
        first = first or seconds_since_start()
    return milliseconds[warmup:], out, first


def time_on_cuda(torch, work, warmup, steps):
    """Events around each step and one wait at the end, so that the host runs ahead as it does in training."""
    first, out = None, None
    for _ in range(warmup):
        out = getattr(work, "warm_up", work)()
        if first is None:
            torch.cuda.synchronize()
            first = seconds_since_start()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        out = work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])], out, first or seconds_since_start()


def time_captured(torch, work, warmup, steps, repeats=10):
    """Median milliseconds of one `work`, out of a CUDA graph of several, so that no host time is in it."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(max(warmup, 2)):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times, _, _ = time_on_cuda(torch, graph.replay, 2, steps)
    return statistics.median(times) / repeats


def attention_backend(arguments):
    """-> a context in which PyTorch uses the asked kernel alone."""
    import contextlib

    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    if arguments.sdpa == "default":
        return contextlib.nullcontext()
    return sdpa_kernel([getattr(SDPBackend, names[arguments.sdpa])])


def bench_attention(arguments):
    """Attention alone on CUDA: q, k and v lie packed as a model's product leaves them; the gradients are of each alone."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(arguments.seed)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    rows = []
    for batch, heads, tokens, width in arguments.attention:
        packed = torch.randn(batch, tokens, 3, heads, width, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4)
        q, k, v = (part.detach().requires_grad_() for part in packed.unbind(0))
        upstream = torch.randn(batch, tokens, heads, width, device="cuda", dtype=dtype).transpose(1, 2)

        def forward():
            with torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v)

        def both():
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), upstream)

        with attention_backend(arguments):
            forward_ms = time_captured(torch, forward, arguments.warmup, arguments.steps)
            both_ms = time_captured(torch, both, arguments.warmup, arguments.steps)
        products = batch * heads * tokens * tokens * width
        backward_ms = both_ms - forward_ms
        rows.append({"shape": [batch, heads, tokens, width], "forward_ms": forward_ms, "backward_ms": backward_ms, "both_ms": both_ms,
                     "forward_tflop_per_second": 4 * products / forward_ms / 1e9,
                     "backward_tflop_per_second": 10 * products / backward_ms / 1e9})
        if not arguments.json:
            print(f"attention {arguments.sdpa} {batch},{heads},{tokens},{width}: forward {forward_ms:.4f} ms, backward {backward_ms:.4f} ms")
    if arguments.json:
        print(json.dumps({"engine": "torch", "version": torch.__version__, "mode": "attention", "sdpa": arguments.sdpa,
                          "dtype": arguments.dtype, "device_name": torch.cuda.get_device_name(), "attention": rows}))


def bench(arguments):
    if arguments.arena:
        keep_freed_memory()
    before_import = status_mib("VmRSS")
    import diffusion  # noqa: F401  (torch and the peer's own modules, so that the next reading is the framework's share)
    import dit_model  # noqa: F401

    before_model = status_mib("VmRSS")
    torch, model, schedule, autocast = build(arguments)
    parameters = sum(p.numel() for p in model.parameters())
    make = step_work if arguments.mode == "step" else inference_work
    work = make(arguments, torch, model, schedule, autocast)
    with attention_backend(arguments):
        if arguments.device == "cuda":
            times, out, first = time_on_cuda(torch, work, arguments.warmup, arguments.steps)
            peak, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
        else:
            times, out, first = time_on_cpu(work, arguments.warmup, arguments.steps)
            peak, reserved = status_mib("VmHWM"), None
    median = statistics.median(times)
    report = {
        "engine": "torch", "version": torch.__version__, "mode": arguments.mode, "model": arguments.model, **model_sizes(arguments),
        "batch": arguments.batch, "dtype": arguments.dtype, "device": arguments.device, "threads": arguments.threads,
        "compile": compile_mode_of(arguments), "compile_cache": compile_cache_use() if compile_mode_of(arguments) else None,
        "arena": arguments.arena, "parameters": parameters,
        "median_ms": median, "min_ms": min(times), "step_ms": times, "images_per_second": 1e3 * arguments.batch / median,
        "sdpa": arguments.sdpa, "device_name": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "sampling_steps": arguments.sampling_steps if arguments.mode == "sample" else None,
        "peak_memory_mib": peak, "reserved_memory_mib": reserved, "first_step_seconds": first, "rss_at_start_mib": before_import, "rss_before_model_mib": before_model,
        "value": float(out.float().mean()),
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        print(f"torch {torch.__version__} {arguments.mode} batch {arguments.batch} {arguments.dtype} {arguments.device}: "
              f"median {median:.1f} ms, {report['images_per_second']:.2f} img/s, peak {peak:.0f} MiB "
              f"({before_model:.0f} MiB before the model existed)")


def main():
    arguments = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    if arguments.check:
        from golden_check import check_files

        raise SystemExit(0 if check_files(arguments.check) else 1)
    if arguments.train_digits:
        from digits import train_and_sample

        train_and_sample(arguments, *build(arguments))
    elif arguments.mode == "attention":
        bench_attention(arguments)
    else:
        bench(arguments)


if __name__ == "__main__":
    main()
