/// What can go wrong below the tensors.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("cannot allocate {bytes} bytes of {purpose} on {device}: {in_use} bytes are in use{hint}")]
    OutOfMemory { device: String, bytes: usize, purpose: &'static str, in_use: usize, hint: String },
    #[error("unknown device '{name}': use 'cpu', 'cpu:THREADS', 'cuda' or 'cuda:INDEX'")]
    UnknownDevice { name: String },
    #[error(
        "cpu:{threads} asks for too many threads: at most {most}, and more than there are processors make it slower"
    )]
    TooManyThreads { threads: usize, most: usize },
    #[error("no CUDA device can be used: {reason}; {searched}")]
    NoCuda { reason: String, searched: String },
    #[error("{missing}; {searched}")]
    NoLibrary { missing: String, searched: String },
    #[error("{call} on {device}: {code}")]
    Cuda { call: &'static str, device: String, code: String },
    #[error("the kernel {kernel} does not compile for {architecture}:\n{log}")]
    Compile { kernel: String, architecture: String, log: String },
    #[error("captured step: {message}")]
    Capture { message: String },
    #[error("{path}: {source}")]
    Cache { path: String, source: std::io::Error },
}
