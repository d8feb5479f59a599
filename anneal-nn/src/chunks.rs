//! How parameters lie in flat chunk buffers of a fixed size.
//!
//! Consecutive parameters share a chunk until the next one does not fit; a parameter never
//! crosses chunks, and one larger than the chunk size has a chunk of its own. Trainable and
//! frozen parameters never share a chunk, so gradients and optimizer state exist for whole
//! chunks. Slots start on multiples of [`ALIGNMENT`] elements.

use crate::{ParamId, Parameters};

/// Elements; 64 bytes of f32, so every weight starts on a cache line.
const ALIGNMENT: usize = 16;

/// Where a parameter lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub chunk: usize,
    /// In elements from the start of the chunk.
    pub offset: usize,
    pub elements: usize,
}

/// A chunk's size and contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSpec {
    /// Including padding between slots.
    pub elements: usize,
    pub trainable: bool,
    pub parameters: Vec<ParamId>,
}

/// The layout of a model's parameters; a pure function of the list and the chunk size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkLayout {
    slots: Vec<Slot>,
    chunks: Vec<ChunkSpec>,
}

impl ChunkLayout {
    /// Lays parameters out in their order; `chunk_elements` is the fixed size of a chunk.
    pub fn new(parameters: &Parameters, chunk_elements: usize) -> Self {
        let mut slots = Vec::with_capacity(parameters.len());
        let mut chunks: Vec<ChunkSpec> = Vec::new();
        // The open chunk of frozen and of trainable parameters.
        let mut open: [Option<usize>; 2] = [None; 2];
        for (id, spec) in parameters.iter() {
            let wanted = spec.elements().next_multiple_of(ALIGNMENT);
            let kind = usize::from(spec.trainable);
            let chunk = open[kind]
                .filter(|chunk| chunks[*chunk].elements + wanted <= chunk_elements)
                .unwrap_or_else(|| {
                    chunks.push(ChunkSpec { elements: 0, trainable: spec.trainable, parameters: Vec::new() });
                    chunks.len() - 1
                });
            open[kind] = Some(chunk);
            slots.push(Slot { chunk, offset: chunks[chunk].elements, elements: spec.elements() });
            chunks[chunk].elements += wanted;
            chunks[chunk].parameters.push(id);
        }
        Self { slots, chunks }
    }

    pub fn slot(&self, id: ParamId) -> Slot {
        self.slots[id.0]
    }

    pub fn chunks(&self) -> &[ChunkSpec] {
        &self.chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, Init};

    #[test]
    fn consecutive_parameters_share_chunks_and_frozen_ones_lie_apart() {
        let mut builder = Builder::new();
        builder.scope("all", |builder| {
            builder.add("a", &[10], Init::Zeros);
            builder.add_frozen("f", &[5], Init::Zeros);
            builder.add("b", &[17], Init::Zeros);
            builder.add("c", &[40], Init::Zeros);
            builder.add("huge", &[1000], Init::Zeros);
            builder.add("d", &[1], Init::Zeros);
        });
        let layout = ChunkLayout::new(&builder.finish(), 64);
        let slots: Vec<_> =
            (0..6).map(|id| (layout.slot(ParamId(id)).chunk, layout.slot(ParamId(id)).offset)).collect();
        assert_eq!(slots, [(0, 0), (1, 0), (0, 16), (2, 0), (3, 0), (4, 0)]);
        let sizes: Vec<_> = layout.chunks().iter().map(|chunk| (chunk.elements, chunk.trainable)).collect();
        assert_eq!(sizes, [(48, true), (16, false), (48, true), (1008, true), (16, true)]);
    }
}
