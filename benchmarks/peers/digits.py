"""Trains the peer on the real digits and writes samples for `quality_digits.py`.

Contract: same model, batch, optimizer, EMA and label drop as `recipes/digits.yaml`; no flips, since a mirrored digit is another
sign. Data order: a new permutation each epoch, short last batches joined with the next epoch. Weights and all draws are made on
the CPU, so that device and precision change none of them.
"""

import json
import time
from pathlib import Path

import numpy as np
from diffusion import guided, sample, sample_flow
from torch_dit import Trainer


class Batches:
    """Endless shuffled batches; `next()` -> (x [b,1,8,8] in [-1, 1], y [b])."""

    def __init__(self, torch, path, batch, seed):
        data = np.load(path)
        self.torch, self.batch = torch, batch
        self.images = torch.tensor(data["images"], dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        self.labels = torch.tensor(data["labels"])
        self.order, self.generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(seed)

    def next(self):
        while len(self.order) < self.batch:
            self.order = self.torch.cat([self.order, self.torch.randperm(len(self.labels), generator=self.generator)])
        picked, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.images[picked], self.labels[picked]


def learning_rate(arguments, step):
    """Linear warm-up, then constant or a half cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / max(arguments.lr_warmup, 1))
    if arguments.lr_schedule == "constant":
        return arguments.lr * warm
    done = max(0, step - arguments.lr_warmup) / max(1, arguments.steps - 1 - arguments.lr_warmup)
    return arguments.lr * warm * 0.5 * (1 + np.cos(np.pi * done))


def draw_time(arguments, torch, count):
    if arguments.objective != "flow":
        return torch.randint(1000, (count,))
    if arguments.time == "logit-normal":
        return torch.sigmoid(torch.randn(count))
    return torch.rand(count)


def sample_digits(arguments, torch, model, schedule, sampler):
    """One `NAME:STEPS[:clip]` -> u8 images [n, 8, 8, 1] and classes [n]; the same starting noise for every sampler."""
    name, steps, *rest = sampler.split(":")
    y = torch.arange(10).repeat_interleave(arguments.per_class)
    torch.manual_seed(arguments.seed + 1)
    x, y = (part.to(arguments.device) for part in (torch.randn(len(y), 1, 8, 8), y))
    network = guided(model, arguments.classes, arguments.guidance)
    if arguments.objective == "flow":
        out = sample_flow(network, x, y, int(steps), 2 if name == "heun" else 1)
    else:
        respaced = schedule.respaced(int(steps), arguments.device)
        out = sample(network, respaced, x, y, sampler=name.removesuffix("_eta1"), eta=float(name.endswith("_eta1")),
                     objective=arguments.objective, clip="clip" in rest)
    pixels = ((out.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy()


def write_samples(arguments, torch, trainer, schedule, step):
    """One npz for every EMA rate and sampler; `--out` itself when there is only one."""
    several = len(arguments.ema) * len(arguments.samplers) * (1 + len(arguments.save_at)) > 1
    live = [p.detach().clone() for p in trainer.parameters]
    for rate, shadow in zip(arguments.ema, trainer.shadows):
        torch._foreach_copy_([p.data for p in trainer.parameters], shadow)
        for sampler in arguments.samplers:
            stem = arguments.out.removesuffix(".npz")
            path = f"{stem}-{step}-ema{rate}-{sampler.replace(':', '_')}.npz" if several else arguments.out
            images, labels = sample_digits(arguments, torch, trainer.model, schedule, sampler)
            np.savez(path, arr_0=images, arr_1=labels)
            print(f"wrote {path}", flush=True)
    torch._foreach_copy_([p.data for p in trainer.parameters], live)


def train_and_sample(arguments, torch, model, schedule, autocast):
    trainer = Trainer(model, schedule, lr=arguments.lr, betas=(0.9, arguments.beta2), weight_decay=arguments.weight_decay,
                      ema=tuple(arguments.ema), objective=arguments.objective, clip_norm=arguments.clip_norm,
                      autocast=autocast)
    batches = Batches(torch, arguments.train_digits, arguments.batch, arguments.seed)
    losses, spent = [], 0.0
    for step in range(arguments.steps):
        start = time.perf_counter()
        trainer.optimizer.param_groups[0]["lr"] = learning_rate(arguments, step)
        x, y = batches.next()
        t = draw_time(arguments, torch, len(y))
        y = torch.where(torch.rand(len(y)) < arguments.label_drop, arguments.classes, y)
        draws = (x, t, y, torch.randn_like(x))
        losses.append(float(trainer.step(*(draw.to(arguments.device) for draw in draws))))
        spent += time.perf_counter() - start
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {1e3 * spent / (step + 1):.0f} ms a step", flush=True)
        if step + 1 in (*arguments.save_at, arguments.steps):
            write_samples(arguments, torch, trainer, schedule, step + 1)
    if arguments.losses:
        Path(arguments.losses).write_text(json.dumps(losses) + "\n")
    print(f"{arguments.steps} steps in {spent:.1f} s")
