#[test]
fn minimal() {
    let r = crate::Recipe::from_yaml(crate::load::MINIMAL, "recipes/x.yaml", &[]).unwrap();
    println!("{}", r.to_yaml());
    for o in [
        "optim.learning_rat=1",
        "optim.lr=fast",
        "data.kind=npy",
        "train=5",
        "optim.lr.x=2",
        "x",
        "train.steps=1e5",
        "train.steps=-1",
        "train.steps=1.5",
        "data.flip=no",
        "ema.rates=[0.9,x]",
        "optim.betas=[1]",
        "optim.betas=[0.1,0.2,0.3]",
        "diffusion.kind=flow",
        "diffusion.kind=flw",
        "diffusion={kind: flow, time: {logit_normal: {mean: 1}}}",
        "diffusion={kind: flow, time: logit_normal}",
        "diffusion={kind: flow, time: {uniform: 3}}",
        "diffusion={kind: flow, steps: 3}",
        "model.kinds=dit",
        "lr=3",
        "model.preset=DiT-XS/2",
        "name=2024",
        "train.chunk_size=8GB",
        "model.image_size=[32,16]",
        "model.image_size=[32]",
        "sample.guidance_mode=interval",
        "zebra=1",
        "optim=null",
        "optim.clip=.nan",
        "device=5",
        "train.batch=null",
        "seed=18446744073709551615",
        "seed=9e20",
        "sample.classes=3",
        "model=null",
        "optim.eps=1e-8",
        "output=null",
        "train.nonfinite_limt=3",
        "model.image_size=-3",
        "data.cache=-1",
        "[a",
        "a=[",
        "train.checkpoint.kep=3",
    ] {
        match crate::Recipe::from_yaml(crate::load::MINIMAL, "recipes/x.yaml", &[o.into()]) {
            Ok(r2) => println!("{o}: {:?}", crate::differences(&r, &r2)),
            Err(e) => println!("{o}: {e}"),
        }
    }
    for y in [
        "",
        "a: [",
        "a: 1\na: 2",
        "- a",
        "model:\n  bad: 1\n  depht:\n    x: 2\n",
        "train:\n\tx: 1",
        "a: b\n---\nc: d",
        "model: {hidden_size: 10, heads: 3, patch_size: 3, depth: 0, image_size: 8, channels: 1, classes: 0, label_dropout: 1.0}\ndata: {kind: digits, path: x}\ntrain: {batch: 0, steps: 0}",
    ] {
        println!("--- {y:?}\n{}", crate::Recipe::from_yaml(y, "recipes/x.yaml", &[]).unwrap_err());
    }
}
