use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use super::Piece;
use crate::kernels::blocks_to_fill;
use crate::ops::elementwise::Walk;
use crate::ops::elementwise::cuda::{WIDEST, WalkArgument};
use crate::{Result, Tensor};

const SOURCE: Source = Source {
    name: "copy",
    code: concat!(include_str!("../elementwise/walk.cuh"), include_str!("kernel.cu")),
};
const THREADS: usize = 256;
/// Words that a thread copies at a time (`AHEAD` in the kernel).
const AHEAD: usize = 4;
/// The most pieces of a launch, of several layouts and of one: addresses and layouts are its argument, of at most 4096
/// bytes.
const MOST_PIECES: usize = 8;
const MOST_ALIKE: usize = 192;

fn macros(
    bytes: usize,
    size: usize,
    index: &str,
    (pieces, layouts): (usize, usize),
) -> Vec<(&'static str, String)> {
    let numbers = [("BYTES", bytes), ("SIZE", size), ("PIECES", pieces), ("LAYOUTS", layouts)];
    let numbers = numbers.into_iter().map(|(name, number)| (name, number.to_string()));
    numbers.chain([("INDEX", index.to_string())]).collect()
}

/// `Layout` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct LayoutArgument {
    count: u64,
    walk: WalkArgument<2>,
}

/// `Pieces` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct PiecesArgument<const PIECES: usize, const LAYOUTS: usize> {
    layouts: [LayoutArgument; LAYOUTS],
    list: [[*mut u8; 2]; PIECES],
}

/// How a piece is walked; zeros are walked as if they came from where they go.
fn walk(piece: &Piece) -> Walk<2> {
    let target = &piece.target;
    let strides = piece.source.as_ref().map_or(target.strides(), Tensor::strides);
    Walk::new(target.dims(), [strides, target.strides()])
}

/// Copies a view into another of the same sizes and dtype.
pub(super) fn strided(cuda: &CudaDevice, source: &Tensor, target: &Tensor) -> Result<()> {
    if source.is_contiguous() && target.is_contiguous() {
        let bytes = source.elements() * source.dtype().size();
        // SAFETY: both have as many bytes, and a target is not the memory of its source.
        unsafe { cuda.copy(source.address(), target.address(), bytes)? };
        return Ok(());
    }
    pieces(cuda, &[Piece { source: Some(source.clone()), target: target.clone() }])
}

/// Fills all targets, a launch for every [`MOST_PIECES`] of them, or for every [`MOST_ALIKE`] where so many more follow
/// each other that lie alike.
pub(super) fn pieces(cuda: &CudaDevice, pieces: &[Piece]) -> Result<()> {
    let pieces = pieces.iter().filter(|piece| piece.target.elements() > 0);
    let walks: Vec<(&Piece, Walk<2>)> = pieces.map(|piece| (piece, walk(piece))).collect();
    let mut rest = &walks[..];
    while let Some((_, first)) = rest.first() {
        let alike = rest.iter().take(MOST_ALIKE).take_while(|(_, walk)| walk == first).count();
        let count = if alike > MOST_PIECES { alike } else { rest.len().min(MOST_PIECES) };
        let (pieces, others) = rest.split_at(count);
        rest = others;
        match count {
            1 => launch::<1, 1>(cuda, pieces)?,
            2..=MOST_PIECES => launch::<MOST_PIECES, MOST_PIECES>(cuda, pieces)?,
            _ => launch::<MOST_ALIKE, 1>(cuda, pieces)?,
        }
    }
    Ok(())
}

/// One launch for at most `PIECES` pieces of one dtype, which lie alike if `LAYOUTS` is 1.
fn launch<const PIECES: usize, const LAYOUTS: usize>(
    cuda: &CudaDevice,
    pieces: &[(&Piece, Walk<2>)],
) -> Result<()> {
    let size = pieces[0].0.target.dtype().size();
    let source = |piece: &Piece| piece.source.as_ref().map_or(std::ptr::null_mut(), Tensor::address);
    let fits = |pack: usize| {
        pack * size <= WIDEST
            && pieces.iter().all(|(piece, walk)| {
                walk.inner.0.is_multiple_of(pack)
                    && walk.packs(0, source(piece), pack, size)
                    && walk.packs(1, piece.target.address(), pack, size)
            })
    };
    let pack = [16, 8, 4, 2].into_iter().find(|pack| fits(*pack)).unwrap_or(1);
    let nothing = WalkArgument::new("copy", std::iter::empty(), 1)?;
    let layouts = [LayoutArgument { count: 0, walk: nothing }; LAYOUTS];
    let mut argument = PiecesArgument { layouts, list: [[std::ptr::null_mut(); 2]; PIECES] };
    for (place, (piece, _)) in argument.list.iter_mut().zip(pieces) {
        *place = [source(piece), piece.target.address()];
    }
    let (mut index, mut most) = ("u32", 0);
    for (layout, (piece, walk)) in argument.layouts.iter_mut().zip(pieces) {
        let (count, walk) = (piece.target.elements() / pack, walk.argument("copy", pack)?);
        *layout = LayoutArgument { count: count as u64, walk };
        index = if walk.index(count) == "u64" { "u64" } else { index };
        most = most.max(count);
    }
    let macros = macros(pack * size, size, index, (PIECES, LAYOUTS));
    let kernel = cuda.kernel(&SOURCE, "copy_strided", &macros)?;
    let blocks = Launch::over(most.div_ceil(AHEAD), THREADS, blocks_to_fill(cuda).div_ceil(pieces.len()));
    let launch = Launch::new([blocks.grid[0] as usize, pieces.len()], THREADS);
    // SAFETY: the walks stay within the views, whose strides and element size these are.
    unsafe { cuda.launch(kernel, launch, Arguments::new().with(argument))? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let sizes = [1, 2, 4, 8];
    let words = [1, 2, 4, 8, 16];
    let pairs = sizes.iter().flat_map(|size| words.iter().map(move |bytes| (*bytes, *size)));
    let pairs = pairs.filter(|(bytes, size)| bytes >= size).map(|(bytes, size)| (bytes, size, "u32"));
    let all = pairs.chain([(4, 4, "u64")]);
    let forms = [(1, 1), (MOST_PIECES, MOST_PIECES), (MOST_ALIKE, 1)];
    let variant =
        |bytes, size, index, form| Variant { source: SOURCE, macros: macros(bytes, size, index, form) };
    all.flat_map(|(bytes, size, index)| forms.map(|form| variant(bytes, size, index, form))).collect()
}
