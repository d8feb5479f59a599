//! Images to patch tokens and back (ViT, arXiv 2010.11929, section 3.1; DiT, 2212.09748, section 3.2).
//!
//! Both are changes of layout alone, composed from `reshape` and `permute`, whose gradients
//! they inherit; the one copy each needs is the last `reshape`'s.

use super::{permute, reshape};
use crate::{Result, Tensor, TensorError};

/// Patches of `p` by `p` pixels: `[b, c, h, w]` to `[b, h/p * w/p, c*p*p]`, the patches row by row
/// and each in the order (channel, y, x), which is that of a convolution's weight.
///
/// # Errors
/// If `p` does not divide both sides of the image.
pub fn patchify(x: &Tensor, p: usize) -> Result<Tensor> {
    let [b, c, h, w] = x.shape("patchify")?;
    if p == 0 || !h.is_multiple_of(p) || !w.is_multiple_of(p) {
        let message = format!("patches of {p} x {p} do not tile images of shape {:?}", x.dims());
        return Err(TensorError::shape("patchify", message));
    }
    let tiles = reshape(x, &[b, c, h / p, p, w / p, p])?;
    reshape(&permute(&tiles, &[0, 2, 4, 1, 3, 5])?, &[b, (h / p) * (w / p), c * p * p])
}

/// The image of a grid of `h` by `w` patches: `[b, h*w, p*p*c]` to `[b, c, h*p, w*p]`, the patches
/// row by row and each in the order (y, x, channel), which is that of DiT's last layer.
///
/// # Errors
/// If the sizes do not multiply to those of `x`.
pub fn unpatchify(x: &Tensor, p: usize, h: usize, w: usize, c: usize) -> Result<Tensor> {
    let [b, n, d] = x.shape("unpatchify")?;
    if n != h * w || d != p * p * c {
        let message =
            format!("tokens of shape {:?} are no {h} x {w} grid of {p} x {p} x {c} patches", x.dims());
        return Err(TensorError::shape("unpatchify", message));
    }
    let tiles = reshape(x, &[b, h, w, p, p, c])?;
    reshape(&permute(&tiles, &[0, 5, 1, 3, 2, 4])?, &[b, c, h * p, w * p])
}
