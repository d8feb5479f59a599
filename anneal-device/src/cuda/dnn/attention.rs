//! Attention as graphs of cuDNN: which tensors, and which operations in which order.
//!
//! `o = softmax(scale q k^T) v` with `log_sums`, the natural logarithm of each softmax's denominator;
//! backward computes the probabilities again: `dv = p^T do`, `ds = p * (do v^T - rowsum(do * o))`,
//! `dq = scale ds k`, `dk = scale ds^T q`. cuDNN recognises the whole graph and runs it as one or a
//! few kernels; nothing that is `Virtual` here exists in memory. The operations and their order are those that NVIDIA's
//! documentation gives for scaled dot-product attention, and other orders are not recognised.

use cudarc::cudnn::sys::{
    cudnnDataType_t as DataType, cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction,
};

use super::graph::{GraphSpec, Id, Operation, Place, TensorSpec, row_major};

const F32: DataType = DataType::CUDNN_DATA_FLOAT;

/// Element type of everything but the sums of logarithms, which are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionElement {
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionPass {
    Forward,
    /// Gradients of queries are added up in an order that differs from run to run.
    Backward,
    /// The same bits every time, for a workspace of 2 B H N M bytes.
    BackwardDeterministic,
}

/// Strides in elements of `[B, N or M, H, D]` whose last dimension is contiguous.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AttentionStrides {
    pub batch: usize,
    pub token: usize,
    pub head: usize,
}

/// One `T` for each tensor of rows of heads; the forward pass has the first four only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AttentionTensors<T> {
    pub query: T,
    pub key: T,
    pub value: T,
    pub output: T,
    pub output_gradient: T,
    pub query_gradient: T,
    pub key_gradient: T,
    pub value_gradient: T,
}

impl<T: Copy> AttentionTensors<T> {
    pub fn map<U>(&self, of: impl Fn(T) -> U) -> AttentionTensors<U> {
        AttentionTensors {
            query: of(self.query),
            key: of(self.key),
            value: of(self.value),
            output: of(self.output),
            output_gradient: of(self.output_gradient),
            query_gradient: of(self.query_gradient),
            key_gradient: of(self.key_gradient),
            value_gradient: of(self.value_gradient),
        }
    }

    /// Those that take part.
    pub fn of_pass(&self, pass: AttentionPass) -> Vec<T> {
        let Self { query, key, value, output, .. } = *self;
        let mut all = vec![query, key, value, output];
        if pass != AttentionPass::Forward {
            all.extend([self.output_gradient, self.query_gradient, self.key_gradient, self.value_gradient]);
        }
        all
    }
}

/// All that a plan depends on beside the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionKey {
    pub pass: AttentionPass,
    pub element: AttentionElement,
    pub batch: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
    pub strides: AttentionTensors<AttentionStrides>,
}

/// A graph with the tensors that the caller must provide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AttentionGraph {
    pub spec: GraphSpec,
    pub tensors: AttentionTensors<Option<Id>>,
    pub log_sums: Id,
    pub scale: Id,
    /// A second number, which is one.
    pub one: Option<Id>,
    /// f32 memory beside the workspace, with its elements.
    pub scratch: Vec<(Id, usize)>,
}

impl AttentionKey {
    fn data_type(&self) -> DataType {
        match self.element {
            AttentionElement::Bf16 => DataType::CUDNN_DATA_BFLOAT16,
            AttentionElement::F16 => DataType::CUDNN_DATA_HALF,
        }
    }

    /// Why cuDNN of this version cannot serve it, as far as is known without asking.
    pub(super) fn unsupported(&self, version: usize) -> Option<String> {
        let most = 256;
        let strides = self.strides.of_pass(self.pass);
        let aligned = |s: &AttentionStrides| [s.batch, s.token, s.head].iter().all(|s| *s > 0 && *s % 8 == 0);
        if !self.dim.is_multiple_of(8) || self.dim > most {
            return Some(format!("a head dim of {} is not a multiple of 8 up to {most}", self.dim));
        }
        if !strides.iter().all(aligned) {
            return Some("rows of heads are not aligned to 16 bytes".into());
        }
        if version < 90_600 || (91_000..91_002).contains(&version) {
            return Some(format!("its version {version} is too old or has known faults"));
        }
        // Up to 9.15 the last, partial block of keys needs a padding mask.
        if version < 91_600 && !self.keys.is_multiple_of(128) {
            return Some(format!("its version {version} wants a multiple of 128 keys"));
        }
        None
    }

    /// The graph of the pass; `single` asks for forward's one-operation form.
    pub(super) fn graph(&self, single: bool) -> AttentionGraph {
        match self.pass {
            AttentionPass::Forward if single => self.single_forward(),
            AttentionPass::Forward => self.composed_forward(),
            AttentionPass::Backward => self.backward(false),
            AttentionPass::BackwardDeterministic => self.backward(true),
        }
    }

    fn sizes(&self) -> [i64; 5] {
        [self.batch, self.heads, self.queries, self.keys, self.dim].map(|size| size as i64)
    }

    /// `[B, H, rows, D]` in the caller's memory.
    fn rows(&self, spec: &mut GraphSpec, rows: i64, strides: AttentionStrides) -> Id {
        let [b, h, _, _, d] = self.sizes();
        let strides = [strides.batch as i64, strides.head as i64, strides.token as i64, 1];
        let data_type = self.data_type();
        spec.tensor(TensorSpec { data_type, dims: [b, h, rows, d], strides, place: Place::Memory })
    }

    /// The same memory as `[B, H, D, rows]`: a right factor of scores.
    fn columns(&self, spec: &mut GraphSpec, columns: i64, strides: AttentionStrides) -> Id {
        let [b, h, _, _, d] = self.sizes();
        let strides = [strides.batch as i64, strides.head as i64, 1, strides.token as i64];
        let data_type = self.data_type();
        spec.tensor(TensorSpec { data_type, dims: [b, h, d, columns], strides, place: Place::Memory })
    }

    /// f32 `[B, H, N, columns]`, row-major, in memory.
    fn statistics(&self, spec: &mut GraphSpec, columns: i64) -> Id {
        let [b, h, n, ..] = self.sizes();
        let dims = [b, h, n, columns];
        spec.tensor(TensorSpec { data_type: F32, dims, strides: row_major(dims), place: Place::Memory })
    }

    fn single_forward(&self) -> AttentionGraph {
        let [_, _, n, m, _] = self.sizes();
        let mut spec = GraphSpec::default();
        let query = self.rows(&mut spec, n, self.strides.query);
        let key = self.rows(&mut spec, m, self.strides.key);
        let value = self.rows(&mut spec, m, self.strides.value);
        let output = self.rows(&mut spec, n, self.strides.output);
        let log_sums = self.statistics(&mut spec, 1);
        let scale = spec.value();
        spec.operations.push(Operation::Attention { query, key, value, output, log_sums, scale });
        let tensors = forward_tensors(query, key, value, output);
        AttentionGraph { spec, tensors, log_sums, scale, one: None, scratch: Vec::new() }
    }

    fn composed_forward(&self) -> AttentionGraph {
        let [b, h, n, m, _] = self.sizes();
        let mut spec = GraphSpec::default();
        let query = self.rows(&mut spec, n, self.strides.query);
        let key = self.columns(&mut spec, m, self.strides.key);
        let value = self.rows(&mut spec, m, self.strides.value);
        let output = self.rows(&mut spec, n, self.strides.output);
        let log_sums = self.statistics(&mut spec, 1);
        let scale = spec.value();
        let (scores, column) = ([b, h, n, m], [b, h, n, 1]);
        let products = spec.between(F32, scores);
        spec.matmul(query, key, products);
        let scaled = spec.between(F32, scores);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, products, scale, scaled);
        let maximum = spec.between(F32, column);
        spec.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, scaled, maximum);
        let shifted = spec.between(F32, scores);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_SUB, scaled, maximum, shifted);
        let powers = spec.between(F32, scores);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_EXP, shifted, None, powers);
        let sum = spec.between(F32, column);
        spec.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, powers, sum);
        let logarithm = spec.between(F32, column);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_LOG, sum, None, logarithm);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_ADD, logarithm, maximum, log_sums);
        let probabilities = spec.between(self.data_type(), scores);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_DIV, powers, sum, probabilities);
        spec.matmul(probabilities, value, output);
        let tensors = forward_tensors(query, key, value, output);
        AttentionGraph { spec, tensors, log_sums, scale, one: None, scratch: Vec::new() }
    }

    fn backward(&self, deterministic: bool) -> AttentionGraph {
        let [_, _, n, m, _] = self.sizes();
        let mut spec = GraphSpec::default();
        let s = &self.strides;
        let query = self.rows(&mut spec, n, s.query);
        let key = self.columns(&mut spec, m, s.key);
        let value = self.columns(&mut spec, m, s.value);
        let output = self.rows(&mut spec, n, s.output);
        let upstream = self.rows(&mut spec, n, s.output_gradient);
        let query_gradient = self.rows(&mut spec, n, s.query_gradient);
        let key_gradient = self.rows(&mut spec, m, s.key_gradient);
        let value_gradient = self.rows(&mut spec, m, s.value_gradient);
        let log_sums = self.statistics(&mut spec, 1);
        let (scale, one) = (spec.value(), spec.value());
        let row_sums = self.row_sums(&mut spec, upstream, output, one);
        let mut scratch = vec![(row_sums, self.batch * self.heads * self.queries)];

        let probabilities = self.probabilities_again(&mut spec, query, key, scale, log_sums);
        self.value_gradient(&mut spec, probabilities, upstream, value_gradient);
        let score_gradient = self.score_gradient(&mut spec, upstream, value, row_sums, probabilities, scale);
        self.key_gradient(&mut spec, score_gradient, query, key_gradient);
        let sum = self.query_gradient(&mut spec, score_gradient, key, query_gradient, deterministic);
        scratch.extend(sum.map(|sum| (sum, self.batch * self.heads * self.queries * self.dim)));
        let tensors = AttentionTensors {
            query: Some(query),
            key: Some(key),
            value: Some(value),
            output: Some(output),
            output_gradient: Some(upstream),
            query_gradient: Some(query_gradient),
            key_gradient: Some(key_gradient),
            value_gradient: Some(value_gradient),
        };
        AttentionGraph { spec, tensors, log_sums, scale, one: Some(one), scratch }
    }

    /// `rowsum(do * o)` `[B, H, N, 1]`, in memory because it is a kernel of its own.
    fn row_sums(&self, spec: &mut GraphSpec, upstream: Id, output: Id, one: Id) -> Id {
        let [b, h, n, _, d] = self.sizes();
        let products = spec.between(F32, [b, h, n, d]);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, upstream, output, products);
        let sums = spec.between(F32, [b, h, n, 1]);
        spec.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, products, sums);
        let kept = self.statistics(spec, 1);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, sums, one, kept);
        kept
    }

    fn scores(&self) -> [i64; 4] {
        let [b, h, n, m, _] = self.sizes();
        [b, h, n, m]
    }

    fn probabilities_again(&self, spec: &mut GraphSpec, query: Id, key: Id, scale: Id, log_sums: Id) -> Id {
        let products = spec.between(F32, self.scores());
        spec.matmul(query, key, products);
        let scaled = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, products, scale, scaled);
        let shifted = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_SUB, scaled, log_sums, shifted);
        let probabilities = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_EXP, shifted, None, probabilities);
        probabilities
    }

    /// Scores of every query as rows of keys, rounded for the matrix unit.
    fn transposed(&self, spec: &mut GraphSpec, scores: Id) -> Id {
        let [b, h, n, m, _] = self.sizes();
        let transposed = spec.tensor(TensorSpec {
            data_type: self.data_type(),
            dims: [b, h, m, n],
            strides: [h * n * m, n * m, 1, m],
            place: Place::Virtual,
        });
        spec.reshape(scores, transposed);
        transposed
    }

    fn value_gradient(&self, spec: &mut GraphSpec, probabilities: Id, upstream: Id, value_gradient: Id) {
        let transposed = self.transposed(spec, probabilities);
        spec.matmul(transposed, upstream, value_gradient);
    }

    fn score_gradient(
        &self,
        spec: &mut GraphSpec,
        upstream: Id,
        value: Id,
        row_sums: Id,
        probabilities: Id,
        scale: Id,
    ) -> Id {
        let products = spec.between(F32, self.scores());
        spec.matmul(upstream, value, products);
        let centred = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_SUB, products, row_sums, centred);
        let gradient = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, centred, probabilities, gradient);
        let scaled = spec.between(F32, self.scores());
        spec.pointwise(Pointwise::CUDNN_POINTWISE_MUL, gradient, scale, scaled);
        scaled
    }

    fn key_gradient(&self, spec: &mut GraphSpec, score_gradient: Id, query: Id, key_gradient: Id) {
        let transposed = self.transposed(spec, score_gradient);
        spec.matmul(transposed, query, key_gradient);
    }

    /// Gives the f32 sums in memory, where there are such.
    fn query_gradient(
        &self,
        spec: &mut GraphSpec,
        score_gradient: Id,
        key: Id,
        query_gradient: Id,
        deterministic: bool,
    ) -> Option<Id> {
        let [b, h, _, m, d] = self.sizes();
        let [batch, head, feature, token] = spec.tensors[key.0].strides;
        let rows = spec.tensor(TensorSpec {
            data_type: self.data_type(),
            dims: [b, h, m, d],
            strides: [batch, head, token, feature],
            place: Place::Virtual,
        });
        spec.reshape(key, rows);
        if deterministic {
            spec.matmul(score_gradient, rows, query_gradient);
            return None;
        }
        let sums = self.statistics(spec, d);
        spec.matmul(score_gradient, rows, sums);
        spec.pointwise(Pointwise::CUDNN_POINTWISE_IDENTITY, sums, None, query_gradient);
        Some(sums)
    }
}

fn forward_tensors(query: Id, key: Id, value: Id, output: Id) -> AttentionTensors<Option<Id>> {
    AttentionTensors {
        query: Some(query),
        key: Some(key),
        value: Some(value),
        output: Some(output),
        ..AttentionTensors::default()
    }
}
