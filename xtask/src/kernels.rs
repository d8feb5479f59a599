//! Compiles every kernel of the engine for every supported architecture, without a GPU.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anneal_device::cuda::{Variant, compile};
use anyhow::bail;

/// Ampere (data centre and desktop), Ada and Hopper.
pub const ARCHITECTURES: [&str; 4] = ["sm_80", "sm_86", "sm_89", "sm_90a"];

/// Compiles all; the number of kernel variants.
///
/// # Errors
/// If NVRTC is missing, or with the compiler's words on all kernels that do not compile.
pub fn compile_all(architectures: &[String]) -> anyhow::Result<usize> {
    let variants: Vec<Variant> = [
        anneal_device::cuda::kernel_variants(),
        anneal_tensor::kernels::catalogue(),
        anneal_optim::kernel_variants(),
    ]
    .concat();
    let jobs: Vec<(&Variant, &String)> =
        variants.iter().flat_map(|variant| architectures.iter().map(move |name| (variant, name))).collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((variant, architecture)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = compile(&variant.source, &variant.macros, architecture) {
                        failures
                            .lock()
                            .expect("no thread panicked")
                            .push(format!("{:?}: {error}", variant.macros));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner()?;
    if !failures.is_empty() {
        bail!("{} of {} compilations failed:\n{}", failures.len(), jobs.len(), failures.join("\n"));
    }
    Ok(variants.len())
}

#[cfg(test)]
mod tests {
    use anneal_device::cuda::compiler_version;
    use anneal_testkit::skip_without;

    #[test]
    fn every_kernel_compiles_where_nvrtc_is_installed() {
        if compiler_version().is_none() {
            return skip_without("NVRTC", "compiling every kernel");
        }
        let architectures = super::ARCHITECTURES.map(String::from);
        assert!(super::compile_all(&architectures).unwrap_or_else(|error| panic!("{error}")) > 0);
    }
}
