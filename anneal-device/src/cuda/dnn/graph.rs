//! A computation as cuDNN wants it described: tensors, and operations between them. Plain data.

use cudarc::cudnn::sys::{
    cudnnDataType_t as DataType, cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction,
};

/// Index of a tensor in its graph; with [`FIRST_ID`] added, the number by which cuDNN knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id(pub usize);

const FIRST_ID: i64 = 1;

impl Id {
    pub(super) fn unique(self) -> i64 {
        self.0 as i64 + FIRST_ID
    }
}

/// Where a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In device memory that the caller gives.
    Memory,
    /// Nowhere: between two operations of one kernel.
    Virtual,
    /// One number in host memory, read when the kernel is started.
    Value,
}

/// Four dimensions, in practice `[B, H, rows, columns]`; strides in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSpec {
    pub data_type: DataType,
    pub dims: [i64; 4],
    pub strides: [i64; 4],
    pub place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// `output = left right` for each batch and head.
    Matmul { left: Id, right: Id, output: Id },
    /// `output = mode(input)`, or of two inputs, the second broadcast where its size is 1.
    Pointwise { mode: Pointwise, input: Id, second: Option<Id>, output: Id },
    /// Over the dimensions in which the output has size 1.
    Reduction { mode: Reduction, input: Id, output: Id },
    /// The same elements seen with other dimensions and strides.
    Reshape { input: Id, output: Id },
    /// Attention's forward pass as one operation.
    Attention { query: Id, key: Id, value: Id, output: Id, log_sums: Id, scale: Id },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct GraphSpec {
    pub tensors: Vec<TensorSpec>,
    pub operations: Vec<Operation>,
}

/// Strides of elements that follow each other in row-major order.
pub(super) fn row_major([_, heads, rows, columns]: [i64; 4]) -> [i64; 4] {
    [heads * rows * columns, rows * columns, columns, 1]
}

impl GraphSpec {
    pub(super) fn tensor(&mut self, spec: TensorSpec) -> Id {
        self.tensors.push(spec);
        Id(self.tensors.len() - 1)
    }

    /// A row-major result between two operations.
    pub(super) fn between(&mut self, data_type: DataType, dims: [i64; 4]) -> Id {
        self.tensor(TensorSpec { data_type, dims, strides: row_major(dims), place: Place::Virtual })
    }

    /// One f32 in host memory.
    pub(super) fn value(&mut self) -> Id {
        let (data_type, dims) = (DataType::CUDNN_DATA_FLOAT, [1; 4]);
        self.tensor(TensorSpec { data_type, dims, strides: dims, place: Place::Value })
    }

    pub(super) fn matmul(&mut self, left: Id, right: Id, output: Id) {
        self.operations.push(Operation::Matmul { left, right, output });
    }

    pub(super) fn pointwise(
        &mut self,
        mode: Pointwise,
        input: Id,
        second: impl Into<Option<Id>>,
        output: Id,
    ) {
        self.operations.push(Operation::Pointwise { mode, input, second: second.into(), output });
    }

    pub(super) fn reduce(&mut self, mode: Reduction, input: Id, output: Id) {
        self.operations.push(Operation::Reduction { mode, input, output });
    }

    pub(super) fn reshape(&mut self, input: Id, output: Id) {
        self.operations.push(Operation::Reshape { input, output });
    }
}
