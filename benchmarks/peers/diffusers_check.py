#!/usr/bin/env python3
"""Opens a diffusers folder in `diffusers` and compares its images with Anneal's for the same latents.

What: runs `diffusers.DiTPipeline` on FOLDER (made by `anneal convert`, or any other DiT folder) from given starting latents and
classes, and writes the final latents; with `--ours` compares them, and the images where the folder has a VAE, with what Anneal
drew. Where the folder has no VAE, one with random weights stands in, since the pipeline class demands one; its output is ignored.
Contract: `--inputs` is an npz with `latents` f32 [n, c, h, w] and `labels` i64 [n] (drawn from a seed when left out); `--out` gets
`latents` f32, `labels`, and `images` f32 [n, H, W, 3] in [0, 1]. `--ours` is an npz or safetensors file with `latents` and/or
`images`, or what `anneal sample --latents` writes: `arr_0`, latents f32 [n, c, h, w], or u8 images [n, h, w, c] of a model of
pixels, which are compared after the same rounding. Exit code 1 where an error exceeds `--tolerance` (largest absolute difference
over the largest value, at least 1), or a rounded pixel differs by more than 1. `--forward` compares the transformer alone: `--inputs`
then also holds `t`, and `--ours` holds `output`. `--golden FILE` takes all of that from a golden file.
Not done: the VAE itself is diffusers' own; nothing here judges quality.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils.logging import disable_progress_bar


def read_arrays(path) -> dict:
    if str(path).endswith(".safetensors"):
        from safetensors.numpy import load_file

        return load_file(path)
    return dict(np.load(path))


def stand_in_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8,), norm_num_groups=4,
                         down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1)


def open_folder(folder: Path):
    """-> (pipeline, whether its VAE is the folder's own)."""
    if not (folder / "transformer" / "config.json").exists():
        raise SystemExit(f"{folder}: no transformer/config.json; make the folder with `anneal convert`")
    if (folder / "model_index.json").exists() and (folder / "vae").is_dir():
        return DiTPipeline.from_pretrained(folder), True
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    parts = {"vae": stand_in_vae(transformer.config.in_channels), "scheduler": scheduler}
    if (folder / "model_index.json").exists():
        return DiTPipeline.from_pretrained(folder, transformer=transformer, **parts), False
    return DiTPipeline(transformer=transformer, **parts), False


class Recorder:
    """Hands the given latents to the pipeline in place of its own draw, and keeps the ones it hands to the VAE."""

    def __init__(self, pipeline, latents):
        self.final, self.scale = None, pipeline.vae.config.scaling_factor
        decode = pipeline.vae.decode

        def record(latents_scaled, *positional, **named):
            self.final = latents_scaled * self.scale
            return decode(latents_scaled, *positional, **named)

        pipeline.vae.decode = record
        import diffusers.pipelines.dit.pipeline_dit as module

        module.randn_tensor = lambda shape, **_: latents.reshape(shape).clone()


def null_class(transformer) -> int:
    """The row that stands for "no class": the table's last one. The pipeline always asks for 1000."""
    rows = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings
    return rows - 1


def translate_null(transformer):
    """Lets the pipeline's fixed null class 1000 mean this model's own where it has another number of classes."""
    last, forward = null_class(transformer), transformer.forward
    if last == 1000:
        return

    def call(*positional, class_labels=None, **named):
        return forward(*positional, class_labels=torch.where(class_labels == 1000, last, class_labels), **named)

    transformer.forward = call


def class_count(folder, transformer) -> int:
    """A converted model of fewer classes has unused rows up to the 1000 that the pipeline expects, and says how many it knows."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return config.get("anneal_classes", null_class(transformer))


def draw_inputs(transformer, classes, count, seed):
    c = transformer.config
    generator = torch.Generator().manual_seed(seed)
    shape = (count, c.in_channels, c.sample_size, c.sample_size)
    labels = torch.randint(classes, (count,), generator=generator)
    return {"latents": torch.randn(shape, generator=generator).numpy(), "labels": labels.numpy()}


def run_pipeline(pipeline, inputs, steps, guidance):
    latents = torch.from_numpy(np.ascontiguousarray(inputs["latents"], dtype=np.float32))
    recorder = Recorder(pipeline, latents)
    translate_null(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[int(y) for y in inputs["labels"]], guidance_scale=guidance, num_inference_steps=steps,
                      output_type="np").images
    final = recorder.final[: len(latents)].detach().numpy()
    return {"latents": final, "labels": inputs["labels"], "images": images}


@torch.no_grad()
def run_transformer(pipeline, inputs):
    take = lambda name: torch.from_numpy(np.ascontiguousarray(inputs[name]))  # noqa: E731
    output = pipeline.transformer(take("latents"), timestep=take("t"), class_labels=take("labels")).sample
    return {"output": output.numpy(), "labels": inputs["labels"]}


def golden_inputs(path, forward):
    """-> (inputs, expected, steps, guidance) of a `dit_pipeline_io` file."""
    from safetensors import safe_open

    arrays = read_arrays(path)
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
    if forward:
        inputs = {"latents": arrays["tr.in"], "t": arrays["tr.t"], "labels": arrays["class_labels"]}
        return inputs, {"output": arrays["tr.out"]}, config["steps"], config["guidance_scale"]
    inputs = {"latents": arrays["latents"], "labels": arrays["class_labels"]}
    return inputs, {"images": arrays["images"]}, config["steps"], config["guidance_scale"]


def compare_pixels(latents, pixels) -> bool:
    """`latents` in [-1, 1] are the image itself here; a value beside a rounding edge may fall to either side."""
    rounded = np.rint((np.clip(latents, -1, 1) + 1) * 127.5).transpose(0, 2, 3, 1).astype(np.int64)
    if rounded.shape != pixels.shape:
        raise SystemExit(f"pixels: diffusers gave {rounded.shape}, ours has {pixels.shape}")
    difference = np.abs(rounded - pixels)
    good = difference.max() <= 1
    print(f"pixels: {(difference != 0).mean():.2%} differ, by at most {difference.max()} of 255, {'ok' if good else 'FAILED'}")
    return bool(good)


def compare(result, ours, tolerance, own_vae) -> bool:
    if "arr_0" in ours and ours["arr_0"].dtype == np.uint8:
        return compare_pixels(result["latents"], ours["arr_0"])
    if "arr_0" in ours:
        ours = {"latents": ours["arr_0"]}
    shared = [key for key in ("latents", "output", "images") if key in result and key in ours and (key != "images" or own_vae)]
    if not shared:
        raise SystemExit(f"nothing to compare: diffusers gave {sorted(result)}, ours has {sorted(ours)}")
    good = True
    for key in shared:
        if result[key].shape != ours[key].shape:
            raise SystemExit(f"{key}: diffusers gave {result[key].shape}, ours has {ours[key].shape}")
        largest = float(np.abs(result[key]).max())
        error = float(np.abs(result[key] - ours[key]).max()) / max(1.0, largest)
        good &= error <= tolerance
        print(f"{key}: largest difference {error:.2e} of the range, values up to {largest:.3f}, "
              f"{'ok' if error <= tolerance else 'FAILED'} (tolerance {tolerance:.0e})")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", help="npz or safetensors with latents, labels (and t with --forward)")
    parser.add_argument("--golden", help="take inputs, expected values and settings from this golden file")
    parser.add_argument("--ours", help="what Anneal drew from the same inputs")
    parser.add_argument("--out", help="npz to write")
    parser.add_argument("--save-inputs", help="npz to write the drawn inputs to, for `anneal sample`")
    parser.add_argument("--forward", action="store_true", help="the transformer alone")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    a = parser.parse_args()
    disable_progress_bar()
    pipeline, own_vae = open_folder(a.folder)
    for path in filter(None, (a.inputs, a.ours, a.golden)):
        if not Path(path).exists():
            raise SystemExit(f"{path}: no such file")
    expected = read_arrays(a.ours) if a.ours else None
    if a.golden:
        inputs, expected, a.steps, a.guidance = golden_inputs(a.golden, a.forward)
    else:
        inputs = read_arrays(a.inputs) if a.inputs else draw_inputs(
            pipeline.transformer, class_count(a.folder, pipeline.transformer), a.count, a.seed)
    if a.forward and "t" not in inputs:
        inputs["t"] = np.linspace(0, 999, len(inputs["labels"])).astype(np.int64)
    if a.save_inputs:
        np.savez(a.save_inputs, **inputs)
    result = run_transformer(pipeline, inputs) if a.forward else run_pipeline(pipeline, inputs, a.steps, a.guidance)
    name = type(pipeline).__name__
    print(f"{a.folder}: opened in {name}, VAE {'of the folder' if own_vae else 'none: a random one stands in'}, "
          f"{len(inputs['labels'])} {'forward passes' if a.forward else f'images, {a.steps} steps, guidance {a.guidance}'}")
    if a.out:
        np.savez(a.out, **result)
    if expected is not None and not compare(result, expected, a.tolerance, own_vae):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
