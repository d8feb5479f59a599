/// What can go wrong below the tensors.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("cannot allocate {bytes} bytes of {purpose} on {device}: {in_use} bytes are in use{hint}")]
    OutOfMemory { device: String, bytes: usize, purpose: &'static str, in_use: usize, hint: String },
    #[error("unknown device '{name}': use 'cpu' or 'cpu:THREADS'")]
    UnknownDevice { name: String },
}
