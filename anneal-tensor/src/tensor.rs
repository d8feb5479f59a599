//! The tensor: a strided view of device memory, with its place on a tape if it is tracked.

use std::sync::Arc;

use anneal_device::cuda::PendingRead;
use anneal_device::{Buffer, Device, Purpose};

use crate::shape::{contiguous_strides, is_contiguous};
use crate::tape::Track;
use crate::{DType, Dims, Element, Result, TensorError, dims};

/// A strided view of memory on a device. Clones share the memory.
///
/// Memory is written when a tensor is made, and after that only by the owner of a flat
/// buffer (gradient sinks, the optimizer) through [`Tensor::shared_data_mut`].
#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    device: Device,
    dtype: DType,
    offset: usize,
    dims: Dims,
    strides: Dims,
    pub(crate) track: Option<Track>,
}

impl Tensor {
    /// Memory of unspecified contents for activations.
    pub fn empty(device: &Device, sizes: &[usize], dtype: DType) -> Result<Self> {
        Self::empty_for(device, sizes, dtype, Purpose::Activations)
    }

    /// Memory of unspecified contents, counted under `purpose`.
    pub fn empty_for(device: &Device, sizes: &[usize], dtype: DType, purpose: Purpose) -> Result<Self> {
        let elements: usize = sizes.iter().product();
        Ok(Self::of_buffer(device, device.allocate(elements * dtype.size(), purpose)?, sizes, dtype))
    }

    fn of_buffer(device: &Device, buffer: Buffer, sizes: &[usize], dtype: DType) -> Self {
        Self {
            buffer: Arc::new(buffer),
            device: device.clone(),
            dtype,
            offset: 0,
            dims: dims(sizes),
            strides: contiguous_strides(sizes),
            track: None,
        }
    }

    pub fn zeros(device: &Device, sizes: &[usize], dtype: DType) -> Result<Self> {
        Self::zeros_for(device, sizes, dtype, Purpose::Activations)
    }

    pub fn zeros_for(device: &Device, sizes: &[usize], dtype: DType, purpose: Purpose) -> Result<Self> {
        let tensor = Self::empty_for(device, sizes, dtype, purpose)?;
        let (start, bytes) = (tensor.buffer.as_ptr(), tensor.elements() * dtype.size());
        // SAFETY: the buffer is fresh, of at least this many bytes, and zero bits are a zero of every dtype.
        match device {
            Device::Cpu(_) => unsafe { std::ptr::write_bytes(start, 0, bytes) },
            Device::Cuda(cuda) => unsafe { cuda.fill_bytes(start, 0, bytes)? },
        }
        Ok(tensor)
    }

    /// A contiguous tensor holding a copy of `values`.
    pub fn from_slice<T: Element>(device: &Device, values: &[T], sizes: &[usize]) -> Result<Self> {
        if values.len() != sizes.iter().product::<usize>() {
            let message = format!("{} values do not fill the shape {sizes:?}", values.len());
            return Err(TensorError::shape("from_slice", message));
        }
        match device {
            Device::Cpu(_) => {
                let mut tensor = Self::empty(device, sizes, T::DTYPE)?;
                tensor.data_mut::<T>().copy_from_slice(values);
                Ok(tensor)
            }
            Device::Cuda(cuda) => {
                let buffer = cuda.upload(bytemuck::cast_slice(values), Purpose::Activations)?;
                Ok(Self::of_buffer(device, buffer, sizes, T::DTYPE))
            }
        }
    }

    /// A tensor of f32 with one value throughout; unlike [`Self::from_slice`] it may stand for a number
    /// that belongs to a captured step.
    pub fn full(device: &Device, value: f32, sizes: &[usize]) -> Result<Self> {
        let mut tensor = Self::empty(device, sizes, DType::F32)?;
        match device {
            Device::Cpu(_) => tensor.data_mut::<f32>().fill(value),
            // SAFETY: the buffer is fresh and holds these words.
            Device::Cuda(cuda) => unsafe {
                cuda.fill_words(tensor.buffer.as_ptr(), value.to_bits(), tensor.elements())?;
            },
        }
        Ok(tensor)
    }

    /// A copy of the elements in row-major order, whatever the strides.
    ///
    /// # Errors
    /// If `T` is not the tensor's dtype (no conversion happens here; see `ops::cast`).
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.read_later()?.wait()
    }

    /// The same, asked for now and waited for later: the device goes on working.
    ///
    /// # Errors
    /// As [`Self::to_vec`].
    pub fn read_later<T: Element>(&self) -> Result<Pending<T>> {
        if T::DTYPE != self.dtype {
            let message = format!("a tensor of {} was read as {}", self.dtype, T::DTYPE);
            return Err(TensorError::DType { op: "to_vec", message });
        }
        let dense = self.contiguous()?;
        let read = match &self.device {
            Device::Cpu(_) => Read::Here(dense.data::<T>().to_vec()),
            Device::Cuda(cuda) => {
                let bytes = dense.elements() * self.dtype.size();
                // SAFETY: the tensor has as many bytes, and the pending read holds it.
                Read::Device(unsafe { cuda.read_later(dense.pointer::<T>().cast(), bytes)? })
            }
        };
        Ok(Pending { read, _source: dense })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Size of one dimension.
    pub fn size(&self, axis: usize) -> usize {
        self.dims[axis]
    }

    /// Strides in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_contiguous(&self) -> bool {
        is_contiguous(&self.dims, &self.strides)
    }

    pub fn is_tracked(&self) -> bool {
        self.track.is_some()
    }

    /// The same memory, unknown to any tape.
    pub fn detach(&self) -> Self {
        Self { track: None, ..self.clone() }
    }

    /// The sizes as `N` numbers, or an error that names `op`.
    pub fn shape<const N: usize>(&self, op: &'static str) -> Result<[usize; N]> {
        <[usize; N]>::try_from(&self.dims[..]).map_err(|_| {
            TensorError::shape(op, format!("expected {N} dimensions, found shape {:?}", &self.dims[..]))
        })
    }

    /// Pointer to the first element of the view.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype.
    pub fn pointer<T: Element>(&self) -> *mut T {
        assert_eq!(T::DTYPE, self.dtype, "a kernel asked for the wrong dtype");
        // SAFETY: the offset lies within the buffer by construction of every view.
        unsafe { self.buffer.as_ptr().cast::<T>().add(self.offset) }
    }

    /// The elements of a contiguous tensor in host memory.
    ///
    /// # Panics
    /// If the view is strided or `T` is not the dtype.
    pub fn data<T: Element>(&self) -> &[T] {
        self.assert_on_host();
        assert!(self.is_contiguous(), "a kernel asked for contiguous data of a strided view");
        // SAFETY: the range lies within the buffer; writers follow the rule in the type's docs.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.elements()) }
    }

    /// The elements of a tensor whose memory nobody else holds.
    ///
    /// # Panics
    /// If the memory is shared, the view is strided, or `T` is not the dtype.
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        assert!(self.is_unique(), "a kernel asked to write memory that is shared");
        // SAFETY: unique, as just checked.
        unsafe { self.shared_data_mut() }
    }

    /// The elements of a contiguous view into memory that others hold as well.
    ///
    /// # Safety
    /// Nobody reads or writes these elements while the slice lives.
    pub unsafe fn shared_data_mut<T: Element>(&mut self) -> &mut [T] {
        self.assert_on_host();
        assert!(self.is_contiguous(), "a kernel asked for contiguous data of a strided view");
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.elements()) }
    }

    fn assert_on_host(&self) {
        assert!(matches!(self.device, Device::Cpu(_)), "the host asked for memory of {}", self.device);
    }

    /// Address of the first element of the view, whatever its dtype.
    pub fn address(&self) -> *mut u8 {
        // SAFETY: the offset lies within the buffer by construction of every view.
        unsafe { self.buffer.as_ptr().add(self.offset * self.dtype.size()) }
    }

    /// Whether no other tensor holds this memory, so that it may be reused in place.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// Another view of the same memory; strides and offset in elements.
    pub(crate) fn view(&self, offset: usize, sizes: &[usize], strides: &[usize]) -> Self {
        Self {
            offset: self.offset + offset,
            dims: dims(sizes),
            strides: dims(strides),
            track: None,
            ..self.clone()
        }
    }

    /// A contiguous piece of a flat buffer: `sizes` at element `offset`.
    ///
    /// # Errors
    /// If the piece does not lie within this contiguous tensor.
    pub fn piece(&self, offset: usize, sizes: &[usize]) -> Result<Self> {
        let elements: usize = sizes.iter().product();
        if !self.is_contiguous() || offset + elements > self.elements() {
            let message = format!(
                "{elements} elements at {offset} do not lie in a buffer of shape {:?}",
                &self.dims[..]
            );
            return Err(TensorError::shape("piece", message));
        }
        Ok(self.view(offset, sizes, &contiguous_strides(sizes)))
    }

    /// The same values in row-major memory: itself if it is so already, else an untracked copy.
    pub fn contiguous(&self) -> Result<Self> {
        if self.is_contiguous() {
            return Ok(self.detach());
        }
        let copy = Self::empty(&self.device, &self.dims, self.dtype)?;
        crate::ops::copy::strided(self, &copy)?;
        Ok(copy)
    }
}

/// Values on their way to the host.
pub struct Pending<T> {
    read: Read<T>,
    /// Keeps the memory until it has been read.
    _source: Tensor,
}

enum Read<T> {
    Here(Vec<T>),
    Device(PendingRead),
}

impl<T: Element> Pending<T> {
    /// Whether the values are there, so that [`Self::wait`] does not wait.
    pub fn ready(&self) -> Result<bool> {
        match &self.read {
            Read::Here(_) => Ok(true),
            Read::Device(read) => Ok(read.ready()?),
        }
    }

    /// The values in row-major order.
    pub fn wait(self) -> Result<Vec<T>> {
        match self.read {
            Read::Here(values) => Ok(values),
            Read::Device(read) => Ok(bytemuck::pod_collect_to_vec(&read.wait()?)),
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tensor({} {:?} on {})", self.dtype, &self.dims[..], self.device)
    }
}
