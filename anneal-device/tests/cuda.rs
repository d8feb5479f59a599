//! Memory, transfers, kernels and captured steps of a GPU; skipped aloud where there is none.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use anneal_device::cuda::{Arguments, Launch, Source};
use anneal_device::{Buffer, CudaDevice, Device, DeviceError, Purpose};

const SOURCE: Source = Source {
    name: "test",
    code: r#"
extern "C" __global__ void multiply_add(const float *x, const float *factor, float *y, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = x[i] * factor[0] + OFFSET;
}
"#,
};

/// A device for as long as this lives, and no other in this process: what another thread asks the driver for may end
/// a capture that is under way.
struct Turn {
    cuda: Arc<CudaDevice>,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Turn {
    type Target = Arc<CudaDevice>;

    fn deref(&self) -> &Self::Target {
        &self.cuda
    }
}

fn device(test: &str) -> Option<Turn> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match Device::cuda(0, None) {
        Ok(Device::Cuda(cuda)) => Some(Turn { cuda, _turn: turn }),
        Ok(Device::Cpu(_)) => unreachable!("a CUDA device was asked for"),
        Err(error) => {
            assert!(std::env::var_os("ANNEAL_REQUIRE_CUDA").is_none(), "{error}");
            println!("skipped: {test}: this machine has no CUDA device");
            None
        }
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn read(cuda: &Arc<CudaDevice>, buffer: &Buffer, count: usize) -> Vec<f32> {
    // SAFETY: the buffer holds as many numbers.
    let bytes = unsafe { cuda.read(buffer.as_ptr(), 4 * count) }.unwrap();
    bytes.chunks(4).map(|word| f32::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// y = x * factor + 1, by way of two buffers that are given back at once.
fn step(cuda: &Arc<CudaDevice>, x: &[f32], factor: f32) -> Result<Buffer, DeviceError> {
    let kernel = cuda.kernel(&SOURCE, "multiply_add", &[("OFFSET", "1.0f".into())])?;
    // Memory that was written and given back when the uploads ask for theirs.
    let early = Device::Cuda(cuda.clone()).allocate(4 * x.len(), Purpose::Activations)?;
    // SAFETY: the buffer holds as many words.
    unsafe { cuda.fill_words(early.as_ptr(), f32::NAN.to_bits(), x.len())? };
    drop(early);
    let x_there = cuda.upload(&bytes(x), Purpose::Activations)?;
    let factor = cuda.upload(&bytes(&[factor]), Purpose::Activations)?;
    let mut previous = x_there;
    for _ in 0..2 {
        let y = Device::Cuda(cuda.clone()).allocate(4 * x.len(), Purpose::Activations)?;
        let arguments = Arguments::new()
            .with(previous.as_ptr())
            .with(factor.as_ptr())
            .with(y.as_ptr())
            .with(x.len() as i32);
        // SAFETY: the arguments are the kernel's.
        unsafe { cuda.launch(kernel, Launch::new(x.len().div_ceil(128), 128), arguments)? };
        previous = y;
    }
    Ok(previous)
}

fn expected(x: &[f32], factor: f32) -> Vec<f32> {
    x.iter().map(|x| (x * factor + 1.0) * factor + 1.0).collect()
}

#[test]
fn a_captured_step_runs_again_with_new_inputs() {
    let Some(cuda) = device("captured steps") else { return };
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let eager = step(&cuda, &x, 3.0).unwrap();
    assert_eq!(read(&cuda, &eager, x.len()), expected(&x, 3.0));
    let (y, graph) = cuda.capture(|| step(&cuda, &x, 2.0)).unwrap();
    assert_eq!(graph.launches(), 3);
    assert_eq!(read(&cuda, &y, x.len()), expected(&x, 2.0));
    for round in 0..5 {
        // Memory that others hold between the replays stays theirs.
        let held = cuda.upload(&bytes(&[7.0; 100_000]), Purpose::Activations).unwrap();
        let new: Vec<f32> = x.iter().map(|x| x + round as f32).collect();
        let y = cuda.replay(&graph, || step(&cuda, &new, 0.5)).unwrap();
        assert_eq!(read(&cuda, &y, x.len()), expected(&new, 0.5));
        assert_eq!(read(&cuda, &held, 100_000), [7.0; 100_000]);
    }
    let shorter = cuda.replay(&graph, || step(&cuda, &x[..10], 1.0)).err().unwrap();
    assert!(shorter.to_string().contains("no longer does what was recorded"), "{shorter}");
    let read_inside = cuda.capture(|| -> Result<_, DeviceError> {
        let y = step(&cuda, &x, 1.0)?;
        // SAFETY: the buffer holds as many bytes.
        unsafe { cuda.read(y.as_ptr(), 8) }
    });
    assert!(read_inside.err().unwrap().to_string().contains("read on the host"));
    assert_eq!(read(&cuda, &step(&cuda, &x, 3.0).unwrap(), x.len()), expected(&x, 3.0), "eager again");
}

/// What is uploaded inside is sent ahead of the captured work, which reads a block of before until that is given back.
#[test]
fn an_upload_does_not_lie_where_a_captured_step_reads() {
    let Some(cuda) = device("uploads of captured steps") else { return };
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let before = cuda.upload(&bytes(&x), Purpose::Activations).unwrap();
    // Whatever is made once is made outside.
    let kernel = cuda.kernel(&SOURCE, "multiply_add", &[("OFFSET", "1.0f".into())]).unwrap();
    let captured = cuda.capture(|| -> Result<_, DeviceError> {
        let factor = cuda.upload(&bytes(&[2.0]), Purpose::Activations)?;
        let y = Device::Cuda(cuda.clone()).allocate(4 * x.len(), Purpose::Activations)?;
        let arguments = Arguments::new().with(before.as_ptr()).with(factor.as_ptr()).with(y.as_ptr());
        // SAFETY: the arguments are the kernel's.
        unsafe { cuda.launch(kernel, Launch::new(8, 128), arguments.with(x.len() as i32))? };
        drop(before);
        let late = cuda.upload(&bytes(&[9.0; 1000]), Purpose::Activations)?;
        Ok((y, late))
    });
    let ((y, late), _graph) = captured.unwrap();
    let expected: Vec<f32> = x.iter().map(|x| 2.0 * x + 1.0).collect();
    assert_eq!(read(&cuda, &y, x.len()), expected);
    assert_eq!(read(&cuda, &late, x.len()), [9.0; 1000]);
}

#[test]
fn memory_is_counted_limited_and_at_the_same_place_each_time() {
    let Some(cuda) = device("memory") else { return };
    let handle = Device::Cuda(cuda.clone());
    let addresses = || -> Vec<usize> {
        let sizes = [100, 5 << 20, 4096, 90 << 20, 5 << 20];
        let held: Vec<Buffer> =
            sizes.iter().map(|bytes| handle.allocate(*bytes, Purpose::Weights).unwrap()).collect();
        held.iter().map(|buffer| buffer.as_ptr() as usize).collect()
    };
    let first = addresses();
    assert_eq!(first, addresses());
    assert_eq!(handle.memory().total(), 0);
    assert!(handle.memory().peak_total >= 100 << 20);
    let small = Device::cuda(0, Some(64 << 20)).unwrap();
    let error = small.allocate(65 << 20, Purpose::Optimizer).err().unwrap().to_string();
    assert!(error.contains("optimizer") && error.contains("memory limit"), "{error}");
}

#[test]
fn large_uploads_and_late_reads() {
    let Some(cuda) = device("transfers") else { return };
    let values: Vec<f32> = (0..30_000_000).map(|i| (i % 8191) as f32).collect();
    let there = cuda.upload(&bytes(&values), Purpose::Activations).unwrap();
    // SAFETY: the buffer holds as many bytes and stays.
    let pending = unsafe { cuda.read_later(there.as_ptr(), 4 * values.len()) }.unwrap();
    let copy = Device::Cuda(cuda.clone()).allocate(4 * values.len(), Purpose::Activations).unwrap();
    // SAFETY: both sides hold as many bytes.
    unsafe { cuda.copy(there.as_ptr(), copy.as_ptr(), 4 * values.len()) }.unwrap();
    assert_eq!(pending.wait().unwrap(), bytes(&values));
    assert!(read(&cuda, &copy, values.len()) == values);
    let waits = cuda.waits();
    for _ in 0..100 {
        step(&cuda, &values[..1000], 1.0).unwrap();
    }
    assert_eq!(cuda.waits(), waits, "nothing waits for the device");
    cuda.synchronize().unwrap();
}
