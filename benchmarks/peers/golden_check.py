"""Compares the peer with golden files: forward, losses, gradients, optimizer and EMA steps, sampling.

Contract: `check_files(paths)` prints one line a quantity and returns whether all stay within tolerance. An error is the largest
absolute difference over the largest absolute golden value of that tensor.
"""

import json

import numpy as np
import torch
from diffusion import Schedule, beta_schedule, diffusion_losses, sample
from dit_model import DiT
from safetensors import safe_open
from torch_dit import Trainer

FORWARD, GRADIENT = 1e-5, 1e-4


def load(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def under(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class Table:
    def __init__(self, path):
        self.path, self.good = path, True

    def add(self, name, pairs, tolerance):
        worst, where = 0.0, ""
        for key, ours, golden in pairs:
            error = float((ours.detach() - golden).abs().max() / golden.abs().max().clamp(min=1e-30))
            if not error <= worst:
                worst, where = error, key
        passed = worst <= tolerance
        self.good &= passed
        print(f"{self.path}: {name:<18} {worst:9.2e} of {tolerance:.0e} {'ok' if passed else 'FAILED'} {where}")


def build(config, parameters):
    model = DiT(config["hidden_size"], config["depth"], config["num_heads"], config["patch_size"], config["input_size"],
                config["in_channels"], config["num_classes"], config["learn_sigma"])
    made = {"pos_embed": model.pos_embed.clone()}
    model.load_state_dict(parameters)
    return model, made


def check_step(table, model, schedule, tensors):
    x, t, y, noise = (tensors[f"in.{name}"] for name in ("x", "t", "y", "noise"))
    table.add("forward", [("", model(x, t, y), tensors["out.forward"])], FORWARD)
    losses = diffusion_losses(model, schedule, x, t, y, noise)
    table.add("losses", [(k, v, tensors[f"out.{k}"]) for k, v in losses.items()], FORWARD)
    losses["loss"].mean().backward()
    gradients = under(tensors, "grad.")
    known = dict(model.named_parameters())
    missing = set(gradients) ^ {k for k, p in known.items() if p.grad is not None}
    if missing:
        raise SystemExit(f"{table.path}: gradients differ in names: {sorted(missing)}")
    table.add("gradients", [(k, known[k].grad, v) for k, v in gradients.items()], GRADIENT)


def train(config, tensors, schedule, parameters):
    """The golden optimizer steps from `parameters` -> (losses, trained weights, EMA weights), the latter two by name."""
    model, _ = build(config, parameters)
    a = config["adamw"]
    trainer = Trainer(model, schedule, lr=a["lr"], betas=tuple(a["betas"]), eps=a["eps"], weight_decay=a["weight_decay"],
                      ema=(config["ema_decay"],))
    losses = [trainer.step(tensors["in.x"], tensors[f"train.{i}.t"], tensors["in.y"], tensors[f"train.{i}.noise"])
              for i in range(len(tensors["train.losses"]))]
    named = dict(model.named_parameters())
    names = [k for k, p in named.items() if p.requires_grad]
    return torch.stack(losses), named, dict(zip(names, trainer.shadows[0]))


def initial_parameters(table, config, tensors, schedule):
    """`param.*`, or where the file holds the trained weights under that name too, the initial weights that its EMA implies:
    the EMA is an average of the initial and of the trained weights, which a fixed point over the steps solves."""
    parameters, trained, golden = (under(tensors, prefix) for prefix in ("param.", "trained.", "ema."))
    if not trained or any(not torch.equal(parameters[k], v) for k, v in trained.items()):
        return parameters
    print(f"{table.path}: param.* equals trained.*; the initial weights are recovered from ema.*")
    share = config["ema_decay"] ** len(tensors["train.losses"])
    start = {**parameters, **{k: v.clone() for k, v in golden.items() if k != "pos_embed"}}
    for _ in range(12):
        _, _, shadow = train(config, tensors, schedule, start)
        for k, ours in shadow.items():
            start[k] += (golden[k] - ours) / share
        if max(float((golden[k] - ours).abs().max()) for k, ours in shadow.items()) < 2e-7:
            break
    return start


def check_training(table, config, tensors, schedule, parameters):
    losses, trained, shadow = train(config, tensors, schedule, parameters)
    table.add("training losses", [("", losses, tensors["train.losses"])], FORWARD)
    table.add("trained weights", [(k, trained[k], v) for k, v in under(tensors, "trained.").items()], GRADIENT)
    table.add("EMA weights", [(k, shadow[k], v) for k, v in under(tensors, "ema.").items() if k in shadow], GRADIENT)


def guided_pair(model, scale):
    """Guidance as the published sampling code batches it: labelled images first, then the same images without a class. The
    second half of the input is ignored; each half keeps its own output beyond the three guided channels."""

    def call(x, t_b, y_b):
        half = x[: len(x) // 2]
        output = model(torch.cat([half, half]), t_b, y_b)
        with_class, without = output[:, :3].chunk(2)
        steered = without + scale * (with_class - without)
        return torch.cat([torch.cat([steered, steered]), output[:, 3:]], dim=1)

    return call


def check_sampling(table, config, tensors, schedule):
    """From the trained weights, with which the golden file was sampled; from `param.*` where it holds no training."""
    model, _ = build(config, under(tensors, "trained.") or under(tensors, "param."))
    model.requires_grad_(False)
    network = guided_pair(model, config["cfg_scale"])
    for name, sampler, eta in (("ddpm", "ddpm", 0.0), ("ddim", "ddim", 0.0), ("ddim_eta1", "ddim", 1.0)):
        noise, kept = tensors[f"sample.{name}.noise"], tensors[f"sample.{name}.timesteps"].numpy()
        # A strided list starts at 0 and stops short of the last step; a respaced one keeps both ends.
        kind = "sections" if kept.max() == schedule.steps - 1 else "ddim"
        respaced = schedule.respaced(len(kept), "cpu", kind)
        if not np.array_equal(np.sort(kept), respaced.timesteps):
            raise SystemExit(f"{table.path}: {name} timesteps are {kept}, the peer's {respaced.timesteps}")
        z, y = tensors["sample.z"], tensors["sample.y"]
        out = sample(network, respaced, z, y, sampler=sampler, eta=eta, noise_at=noise.__getitem__)
        table.add(f"sample {name}", [("", out, tensors[f"sample.{name}.out"])], GRADIENT)


def check_files(paths) -> bool:
    good = True
    for path in paths:
        config, tensors = load(path)
        if config.get("model") != "DiT":
            raise SystemExit(f"{path}: not a DiT golden file (config {config})")
        table = Table(path)
        schedule = Schedule(beta_schedule("linear", 1000), "cpu")
        parameters = initial_parameters(table, config, tensors, schedule)
        model, made = build(config, parameters)
        table.add("position table", [("", made["pos_embed"], tensors["param.pos_embed"])], FORWARD)
        check_step(table, model, schedule, tensors)
        if "train.losses" in tensors:
            check_training(table, config, tensors, schedule, parameters)
        if "sample.z" in tensors:
            check_sampling(table, config, tensors, schedule)
        good &= table.good
    return good
