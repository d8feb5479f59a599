//! cuDNN's backend interface: descriptors with attributes, from which graphs and plans are made.
//!
//! Values of cuDNN's enumerations are only written, never read back: a newer library may know
//! more of them than the bindings. Every call here wants the library to be there.

use std::ffi::{CStr, c_char, c_void};

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t as Heuristic, cudnnDataType_t as DataType,
};

use super::graph::{GraphSpec, Id, Operation, Place, TensorSpec};
use crate::DeviceError;

/// An error unless the call succeeded; the text is the library's.
pub(super) fn check(call: &'static str, status: sys::cudnnStatus_t) -> Result<(), DeviceError> {
    if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut text = [0u8; 1024];
    // SAFETY: the library is loaded, since it gave this status; it ends the text with a zero.
    unsafe { sys::cudnnGetLastErrorString(text.as_mut_ptr().cast::<c_char>(), text.len()) };
    let text = CStr::from_bytes_until_nul(&text).map_or("".into(), CStr::to_string_lossy);
    let code = format!("{} {}", status as u32, text.trim());
    Err(DeviceError::Cuda { call, device: "cuDNN".into(), code })
}

/// A descriptor, destroyed when dropped.
pub(super) struct Descriptor(sys::cudnnBackendDescriptor_t);
// SAFETY: a handle to memory of the library that is not bound to a thread.
unsafe impl Send for Descriptor {}
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used any more.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

impl Descriptor {
    pub(super) fn new(kind: Kind) -> Result<Self, DeviceError> {
        let mut descriptor = std::ptr::null_mut();
        // SAFETY: the library is there.
        let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut descriptor) };
        check("cudnnBackendCreateDescriptor", status)?;
        Ok(Self(descriptor))
    }

    pub(super) fn raw(&self) -> sys::cudnnBackendDescriptor_t {
        self.0
    }

    /// Sets an attribute; `T` must be what the type says.
    pub(super) fn with<T: Copy>(self, name: Name, kind: Type, values: &[T]) -> Result<Self, DeviceError> {
        let (count, pointer) = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: the values live through the call, which copies them.
        let status = unsafe { sys::cudnnBackendSetAttribute(self.0, name, kind, count, pointer) };
        check("cudnnBackendSetAttribute", status)?;
        Ok(self)
    }

    pub(super) fn link(self, name: Name, others: &[&Descriptor]) -> Result<Self, DeviceError> {
        let others: Vec<_> = others.iter().map(|other| other.0).collect();
        self.with(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &others)
    }

    pub(super) fn finalize(self) -> Result<Self, DeviceError> {
        // SAFETY: the descriptor exists.
        check("cudnnBackendFinalize", unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    /// Fills `values` with what the attribute has; their number.
    fn read<T: Copy>(&self, name: Name, kind: Type, values: &mut [T]) -> Result<usize, DeviceError> {
        let mut count = 0;
        let (asked, pointer) = (values.len() as i64, values.as_mut_ptr().cast::<c_void>());
        let pointer = if asked == 0 { std::ptr::null_mut() } else { pointer };
        // SAFETY: the values have room for as many as are asked for.
        let status = unsafe { sys::cudnnBackendGetAttribute(self.0, name, kind, asked, &mut count, pointer) };
        check("cudnnBackendGetAttribute", status)?;
        Ok(count as usize)
    }

    pub(super) fn number(&self, name: Name) -> Result<i64, DeviceError> {
        let mut value = [0i64];
        self.read(name, Type::CUDNN_TYPE_INT64, &mut value)?;
        Ok(value[0])
    }

    pub(super) fn text(&self, name: Name) -> Result<Vec<u8>, DeviceError> {
        let mut text = vec![0u8; self.read::<u8>(name, Type::CUDNN_TYPE_CHAR, &mut [])?];
        let count = self.read(name, Type::CUDNN_TYPE_CHAR, &mut text)?;
        text.truncate(count);
        Ok(text)
    }

    /// Descriptors of `kind`; there may be fewer than the count says at first, since the library looks
    /// closer when it is asked for them.
    fn descriptors(&self, name: Name, kind: Kind) -> Result<Vec<Descriptor>, DeviceError> {
        let count = self.read::<*mut c_void>(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut [])?;
        let mut all = (0..count).map(|_| Descriptor::new(kind)).collect::<Result<Vec<_>, _>>()?;
        let mut raw: Vec<_> = all.iter().map(|descriptor| descriptor.0).collect();
        let count = self.read(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut raw)?;
        all.truncate(count);
        Ok(all)
    }
}

/// What plans are made for.
pub(super) enum Target {
    Device(sys::cudnnHandle_t),
    /// A description of a device that need not be there.
    #[cfg(test)]
    Described(Descriptor),
}

impl Target {
    /// From JSON with the keys of cuDNN's device properties.
    #[cfg(test)]
    pub(super) fn described(properties: &str) -> Result<Self, DeviceError> {
        let text = properties.as_bytes();
        let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, Type::CUDNN_TYPE_CHAR, text)?
            .finalize()?;
        Ok(Target::Described(descriptor))
    }

    /// `descriptor` bound to the target by the attribute that fits; either may not exist.
    #[cfg_attr(not(test), expect(unused_variables, reason = "devices are described in tests only"))]
    fn bind(
        &self,
        descriptor: Descriptor,
        handle: Option<Name>,
        properties: Option<Name>,
    ) -> Result<Descriptor, DeviceError> {
        match self {
            Target::Device(device) => match handle {
                Some(name) => descriptor.with(name, Type::CUDNN_TYPE_HANDLE, &[*device]),
                None => Ok(descriptor),
            },
            #[cfg(test)]
            Target::Described(description) => match properties {
                Some(name) => descriptor.link(name, &[description]),
                None => Ok(descriptor),
            },
        }
    }

    fn bind_plan(&self, plan: Descriptor) -> Result<Descriptor, DeviceError> {
        let handle = Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE;
        self.bind(plan, Some(handle), Some(Name::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP))
    }
}

/// A graph in the library's memory, with everything that it is made of.
pub(super) struct Graph {
    graph: Descriptor,
    _parts: Vec<Descriptor>,
}

impl Graph {
    pub(super) fn new(target: &Target, spec: &GraphSpec) -> Result<Self, DeviceError> {
        let tensors = spec.tensors.iter().enumerate();
        let tensors = tensors.map(|(index, spec)| tensor(Id(index), spec)).collect::<Result<Vec<_>, _>>()?;
        let mut parts = Vec::new();
        let operations = spec.operations.iter();
        let operations = operations
            .map(|operation| operator(operation, &tensors, &mut parts))
            .collect::<Result<Vec<_>, _>>()?;
        let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        let graph =
            graph.link(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &operations.iter().collect::<Vec<_>>())?;
        let graph = target.bind(graph, Some(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE), None)?.finalize()?;
        parts.extend(operations);
        parts.extend(tensors);
        Ok(Self { graph, _parts: parts })
    }

    /// Ways to run the graph, the one that the library thinks fastest first.
    pub(super) fn configurations(&self, target: &Target) -> Result<Vec<Descriptor>, DeviceError> {
        let heuristic = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .link(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[&self.graph])?
            .with(
                Name::CUDNN_ATTR_ENGINEHEUR_MODE,
                Type::CUDNN_TYPE_HEUR_MODE,
                &[Heuristic::CUDNN_HEUR_MODE_A],
            )?;
        let heuristic =
            target.bind(heuristic, None, Some(Name::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP))?.finalize()?;
        heuristic.descriptors(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)
    }
}

/// Compiles a configuration.
pub(super) fn plan(target: &Target, configuration: &Descriptor) -> Result<Descriptor, DeviceError> {
    let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
        .link(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[configuration])?;
    target.bind_plan(plan)?.finalize()
}

/// A compiled plan from the text that [`plan_text`] gave.
pub(super) fn plan_of_text(target: &Target, text: &[u8]) -> Result<Descriptor, DeviceError> {
    let plan = target.bind_plan(Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?)?;
    plan.with(Name::CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, Type::CUDNN_TYPE_CHAR, text)?.finalize()
}

/// A plan with its machine code, as JSON.
pub(super) fn plan_text(plan: &Descriptor) -> Result<Vec<u8>, DeviceError> {
    plan.text(Name::CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION)
}

/// The tensors of one run.
pub(super) fn variant_pack(
    ids: &[Id],
    pointers: &[*mut c_void],
    workspace: *mut c_void,
) -> Result<Descriptor, DeviceError> {
    let ids: Vec<i64> = ids.iter().map(|id| id.unique()).collect();
    Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Type::CUDNN_TYPE_INT64, &ids)?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Type::CUDNN_TYPE_VOID_PTR, pointers)?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Type::CUDNN_TYPE_VOID_PTR, &[workspace])?
        .finalize()
}

fn tensor(id: Id, spec: &TensorSpec) -> Result<Descriptor, DeviceError> {
    let alignment = [if spec.place == Place::Value { 4i64 } else { 16 }];
    let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, Type::CUDNN_TYPE_INT64, &[id.unique()])?
        .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[spec.data_type])?
        .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, Type::CUDNN_TYPE_INT64, &spec.dims)?
        .with(Name::CUDNN_ATTR_TENSOR_STRIDES, Type::CUDNN_TYPE_INT64, &spec.strides)?
        .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Type::CUDNN_TYPE_INT64, &alignment)?;
    let descriptor = match spec.place {
        Place::Memory => descriptor,
        Place::Virtual => {
            descriptor.with(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Type::CUDNN_TYPE_BOOLEAN, &[true])?
        }
        Place::Value => {
            descriptor.with(Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Type::CUDNN_TYPE_BOOLEAN, &[true])?
        }
    };
    descriptor.finalize()
}

/// The descriptor of an operation; the one with its settings goes to `parts`.
fn operator(
    operation: &Operation,
    tensors: &[Descriptor],
    parts: &mut Vec<Descriptor>,
) -> Result<Descriptor, DeviceError> {
    let (kind, links) = links(operation);
    let mut descriptor = Descriptor::new(kind)?;
    for (name, id) in links {
        descriptor = descriptor.link(name, &[&tensors[id.0]])?;
    }
    if let Some((name, settings)) = settings(operation)? {
        descriptor = descriptor.link(name, &[&settings])?;
        parts.push(settings);
    }
    descriptor.finalize()
}

/// The kind of an operation, and its tensors by the roles that they have.
fn links(operation: &Operation) -> (Kind, Vec<(Name, Id)>) {
    match *operation {
        Operation::Matmul { left, right, output } => (
            Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR,
            vec![
                (Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, left),
                (Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, right),
                (Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, output),
            ],
        ),
        Operation::Pointwise { input, second, output, .. } => {
            let mut links = vec![
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, input),
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, output),
            ];
            links.extend(second.map(|second| (Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, second)));
            (Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, links)
        }
        Operation::Reduction { input, output, .. } => (
            Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR,
            vec![
                (Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, input),
                (Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, output),
            ],
        ),
        Operation::Reshape { input, output } => (
            Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR,
            vec![
                (Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, input),
                (Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, output),
            ],
        ),
        Operation::Attention { query, key, value, output, log_sums, scale } => (
            Kind::CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR,
            vec![
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, query),
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, key),
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, value),
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, output),
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_STATSDESC, log_sums),
                (Name::CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, scale),
            ],
        ),
    }
}

/// What is computed beside which tensors take part, for the operations that have settings; all compute in f32.
fn settings(operation: &Operation) -> Result<Option<(Name, Descriptor)>, DeviceError> {
    let f32 = [DataType::CUDNN_DATA_FLOAT];
    let settings = match *operation {
        Operation::Matmul { .. } => {
            let matmul = Descriptor::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?.with(
                Name::CUDNN_ATTR_MATMUL_COMP_TYPE,
                Type::CUDNN_TYPE_DATA_TYPE,
                &f32,
            )?;
            (Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, matmul.finalize()?)
        }
        Operation::Pointwise { mode, .. } => {
            let pointwise = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
                .with(Name::CUDNN_ATTR_POINTWISE_MODE, Type::CUDNN_TYPE_POINTWISE_MODE, &[mode])?
                .with(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, Type::CUDNN_TYPE_DATA_TYPE, &f32)?;
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise.finalize()?)
        }
        Operation::Reduction { mode, .. } => {
            let reduction = Descriptor::new(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?
                .with(Name::CUDNN_ATTR_REDUCTION_OPERATOR, Type::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, &[mode])?
                .with(Name::CUDNN_ATTR_REDUCTION_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &f32)?;
            (Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, reduction.finalize()?)
        }
        Operation::Reshape { .. } | Operation::Attention { .. } => return Ok(None),
    };
    Ok(Some(settings))
}
