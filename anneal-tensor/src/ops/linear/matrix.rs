//! Tensors seen as matrices.

use crate::shape::reshape_strides;
use crate::{Result, Tensor};

/// A tensor as `[rows, columns]`; it holds the copy that a view without such strides needs.
pub(in crate::ops) struct MatrixView {
    pub memory: Tensor,
    pub rows: usize,
    pub columns: usize,
    /// Elements from row to row and from column to column.
    pub strides: [usize; 2],
}

impl MatrixView {
    /// `[.., columns]` as `[rows, columns]`.
    pub fn of_rows(tensor: &Tensor) -> Result<Self> {
        let columns = tensor.size(tensor.rank() - 1);
        Self::new(tensor, tensor.elements() / columns.max(1), columns)
    }

    /// A weight `[outputs, ..]` as `[outputs, inner]`.
    pub fn of_weight(tensor: &Tensor) -> Result<Self> {
        Self::new(tensor, tensor.size(0), tensor.elements() / tensor.size(0).max(1))
    }

    fn new(tensor: &Tensor, rows: usize, columns: usize) -> Result<Self> {
        match reshape_strides(tensor.dims(), tensor.strides(), &[rows, columns]) {
            Some(strides) => {
                Ok(Self { memory: tensor.detach(), rows, columns, strides: [strides[0], strides[1]] })
            }
            None => Self { memory: tensor.detach(), rows, columns, strides: [columns, 1] }.dense(),
        }
    }

    /// The same with rows that follow each other without gaps.
    pub fn dense(self) -> Result<Self> {
        Ok(Self { memory: self.memory.contiguous()?, strides: [self.columns, 1], ..self })
    }
}
