"""Diffusion math of the PyTorch peer: schedules, training losses and samplers.

Contract: plain functions and one table class over tensors [batch, channels, height, width]; the network is a callable.
Source: DDPM (arXiv 2006.11239) eq. 4 to 7 and 12, improved DDPM (2102.09672) eq. 14, 15 and 17, DDIM (2010.02502) eq. 12 and
16, progressive distillation (2202.00512) for v, flow matching (2210.02747), DPM-Solver++ (2211.01095) algorithm 2,
classifier-free guidance (2207.12598).
Not done: respacing lists, continuous time other than flow matching.
"""

import math

import numpy as np
import torch

OBJECTIVES = ("epsilon", "v", "flow")


def beta_schedule(name: str, steps: int) -> np.ndarray:
    if name == "linear":
        return np.linspace(1e-4, 0.02, steps, dtype=np.float64) if steps == 1000 else np.linspace(
            1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=np.float64)
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


class Schedule:
    """Constants of a beta schedule on `device`, each [steps]; `timesteps` maps a respaced index to the trained one."""

    def __init__(self, betas: np.ndarray, device, timesteps=None):
        alpha_bar = np.cumprod(1 - betas)
        previous = np.append(1.0, alpha_bar[:-1])
        variance = betas * (1 - previous) / (1 - alpha_bar)
        self.betas_f64, self.alpha_bar_f64, self.steps = betas, alpha_bar, len(betas)
        self.timesteps = np.arange(self.steps) if timesteps is None else timesteps
        table = {
            "alpha_bar": alpha_bar,
            "alpha_bar_previous": previous,
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
            "posterior_log_variance": np.log(np.append(variance[1], variance[1:])),
            "posterior_x0": betas * np.sqrt(previous) / (1 - alpha_bar),
            "posterior_xt": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
            "log_beta": np.log(betas),
        }
        for name, values in table.items():
            setattr(self, name, torch.tensor(values, dtype=torch.float32, device=device))

    def respaced(self, count: int, device, kind: str = "sections") -> "Schedule":
        """`sections`: `count` steps spread over the whole range, both ends kept; `ddim`: a fixed integer stride from 0."""
        if kind == "ddim":
            kept = np.arange(0, self.steps, self.steps // count)[:count]
        else:
            stride = (self.steps - 1) / max(count - 1, 1)
            kept = np.array([round(stride * i) for i in range(count)])
        kept_alpha_bar = self.alpha_bar_f64[kept]
        betas = 1 - kept_alpha_bar / np.append(1.0, kept_alpha_bar[:-1])
        return Schedule(betas, device, kept)


def at(table: torch.Tensor, t_b: torch.Tensor) -> torch.Tensor:
    return table[t_b].view(-1, 1, 1, 1)


def mean_of_image(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def normal_cdf(x):
    """The tanh approximation that published likelihoods of this family use (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x, mean, log_scale):
    """DDPM eq. 13: mass of the normal over the 1/127.5-wide bin around `x`, whose range is [-1, 1]."""
    inverse_scale = torch.exp(-log_scale)
    upper = normal_cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    lower = normal_cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))


def learned_log_variance(schedule, value, t_b):
    """Improved DDPM eq. 15: interpolates between the two bounds in the log domain; `value` in [-1, 1]."""
    fraction = (value + 1) / 2
    return fraction * at(schedule.log_beta, t_b) + (1 - fraction) * at(schedule.posterior_log_variance, t_b)


def predict_x0(schedule, x_t, t_b, epsilon):
    return (x_t - at(schedule.sqrt_one_minus_alpha_bar, t_b) * epsilon) / at(schedule.sqrt_alpha_bar, t_b)


def posterior_mean(schedule, x0, x_t, t_b):
    return at(schedule.posterior_x0, t_b) * x0 + at(schedule.posterior_xt, t_b) * x_t


def variational_bound(schedule, epsilon, value, x0, x_t, t_b):
    """One term of the bound in bits per dimension [b]; the caller detaches `epsilon` so that only the variance learns."""
    log_variance = learned_log_variance(schedule, value, t_b)
    mean = posterior_mean(schedule, predict_x0(schedule, x_t, t_b, epsilon), x_t, t_b)
    true_mean = posterior_mean(schedule, x0, x_t, t_b)
    kl = normal_kl(true_mean, at(schedule.posterior_log_variance, t_b), mean, log_variance)
    likelihood = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(t_b == 0, mean_of_image(likelihood), mean_of_image(kl)) / math.log(2.0)


def diffusion_losses(model, schedule, x0, t_b, y_b, noise, objective="epsilon"):
    """Per-sample losses as a dict of [b]: `mse`, with learned sigma also `vb`, and their sum `loss`."""
    mix_x, mix_noise = at(schedule.sqrt_alpha_bar, t_b), at(schedule.sqrt_one_minus_alpha_bar, t_b)
    x_t = mix_x * x0 + mix_noise * noise
    output = model(x_t, t_b, y_b).float()
    target = noise if objective == "epsilon" else mix_x * noise - mix_noise * x0
    if output.shape[1] == x0.shape[1]:
        mse = mean_of_image((target - output) ** 2)
        return {"mse": mse, "loss": mse, "x_t": x_t}
    prediction, value = output.chunk(2, dim=1)
    mse = mean_of_image((target - prediction) ** 2)
    frozen = prediction.detach()
    epsilon = frozen if objective == "epsilon" else mix_x * frozen + mix_noise * x_t
    vb = variational_bound(schedule, epsilon, value, x0, x_t, t_b)
    return {"mse": mse, "vb": vb, "loss": mse + vb, "x_t": x_t}


def flow_losses(model, x0, time_b, y_b, noise):
    """Rectified flow: x = (1 - s) x0 + s noise, the network predicts noise - x0; it is told the time as 1000 s."""
    s = time_b.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    output = model(x_t, 1000 * time_b, y_b).float()
    mse = mean_of_image((noise - x0 - output[:, : x0.shape[1]]) ** 2)
    return {"mse": mse, "loss": mse, "x_t": x_t}


def guided(model, classes, guidance, guided_channels=None):
    """Classifier-free guidance in one batched forward over the first `guided_channels` channels (all when None)."""

    def call(x, t_b, y_b):
        none = torch.full_like(y_b, classes)
        both = model(torch.cat([x, x]), torch.cat([t_b, t_b]), torch.cat([y_b, none])).float()
        with_class, without = both.chunk(2)
        count = guided_channels or x.shape[1]
        steered = without[:, :count] + guidance * (with_class[:, :count] - without[:, :count])
        return torch.cat([steered, with_class[:, count:]], dim=1)

    return call


def split_output(schedule, output, x, t_b, objective, clip):
    """-> (x0, epsilon, variance value or None); `clip` bounds x0 to [-1, 1] and makes epsilon agree with it."""
    channels = x.shape[1]
    prediction, value = output[:, :channels], (output[:, channels:] if output.shape[1] > channels else None)
    a, s = at(schedule.sqrt_alpha_bar, t_b), at(schedule.sqrt_one_minus_alpha_bar, t_b)
    if objective == "v":
        x0, epsilon = a * x - s * prediction, a * prediction + s * x
    else:
        x0, epsilon = (x - s * prediction) / a, prediction
    if clip:
        x0 = x0.clamp(-1, 1)
        epsilon = (x - a * x0) / s
    return x0, epsilon, value


@torch.no_grad()
def sample(model, schedule, x, y, *, sampler="ddim", eta=0.0, objective="epsilon", clip=False, noise_at=None):
    """Runs ddpm, ddim or dpm++ (2M) over a respaced `schedule`; `noise_at(i)` gives the draw of step i (first step 0)."""
    noise_at = noise_at or (lambda _: torch.randn_like(x))
    memory = None
    for step, index in enumerate(reversed(range(schedule.steps))):
        index_b = torch.full((len(x),), index, device=x.device)
        output = model(x, torch.full_like(index_b, int(schedule.timesteps[index])), y)
        x0, epsilon, value = split_output(schedule, output, x, index_b, objective, clip)
        if sampler == "ddpm":
            x = ddpm_step(schedule, x, x0, value, index_b, noise_at(step))
        elif sampler == "ddim":
            x = ddim_step(schedule, x0, epsilon, index_b, eta, noise_at(step))
        else:
            x = dpm_solver_step(schedule, x, x0, memory, index)
            memory = x0
    return x


def ddpm_step(schedule, x, x0, value, index_b, noise):
    mean = posterior_mean(schedule, x0, x, index_b)
    log_variance = at(schedule.posterior_log_variance, index_b)
    if value is not None:
        log_variance = learned_log_variance(schedule, value, index_b)
    return mean + (index_b[0] != 0) * torch.exp(0.5 * log_variance) * noise


def ddim_step(schedule, x0, epsilon, index_b, eta, noise):
    now, previous = at(schedule.alpha_bar, index_b), at(schedule.alpha_bar_previous, index_b)
    sigma = eta * torch.sqrt((1 - previous) / (1 - now) * (1 - now / previous))
    x = torch.sqrt(previous) * x0 + torch.sqrt(1 - previous - sigma**2) * epsilon
    return x + (index_b[0] != 0) * sigma * noise


def log_signal_to_noise(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def dpm_solver_step(schedule, x, x0, x0_before, index):
    """Data-prediction multistep of order 2; the first step is of order 1 and the last returns x0."""
    if index == 0:
        return x0
    now, following = schedule.alpha_bar_f64[index], schedule.alpha_bar_f64[index - 1]
    h = log_signal_to_noise(following) - log_signal_to_noise(now)
    direction = x0
    if x0_before is not None:
        h_before = log_signal_to_noise(now) - log_signal_to_noise(schedule.alpha_bar_f64[index + 1])
        direction = x0 + (x0 - x0_before) * (h / (2 * h_before))
    return math.sqrt((1 - following) / (1 - now)) * x - math.sqrt(following) * math.expm1(-h) * direction


@torch.no_grad()
def sample_flow(model, x, y, steps, order=1):
    """Euler (order 1) or Heun (order 2) from s = 1 to 0 in `steps` equal intervals."""
    times = torch.linspace(1, 0, steps + 1).tolist()
    for s, s_next in zip(times[:-1], times[1:]):
        at_time = lambda value: torch.full((len(x),), 1000 * value, device=x.device)  # noqa: E731
        velocity = model(x, at_time(s), y)[:, : x.shape[1]]
        ahead = x + (s_next - s) * velocity
        if order == 2 and s_next > 0:
            second = model(ahead, at_time(s_next), y)[:, : x.shape[1]]
            ahead = x + (s_next - s) * 0.5 * (velocity + second)
        x = ahead
    return x
