//! A small fork-join pool for data-parallel kernels.
//!
//! Contract: [`ThreadPool::run`] calls `task(0..count)` exactly once each, on the
//! caller and the workers, and returns when all are done. Which thread runs which
//! index is unspecified, so a task's result must depend on its index alone: that is
//! what makes a run's bits independent of the number of threads.
//! Workers spin briefly between calls (kernels of one step follow each other within
//! microseconds) and then sleep. Not done: nesting (a nested call runs inline).

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Rounds of `spin_loop` before a worker goes to sleep, roughly 50 microseconds.
const SPIN_ROUNDS: usize = 4000;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}
// SAFETY: the pointee is `Sync`, and `run` does not return before every worker has left it.
unsafe impl Send for Job {}

struct Shared {
    job: Mutex<Option<Job>>,
    wake: Condvar,
    epoch: AtomicUsize,
    next: AtomicUsize,
    busy: AtomicUsize,
    panicked: AtomicBool,
    shutdown: AtomicBool,
}

/// A fixed set of threads; the calling thread counts as one of them.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One `run` at a time; a second caller waits here.
    gate: Mutex<()>,
}

impl ThreadPool {
    /// `threads` of at least 1, the caller included.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            wake: Condvar::new(),
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map(|index| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("anneal-compute-{index}"))
                    .spawn(move || worker(&shared))
                    .expect("the operating system refused a compute thread")
            })
            .collect();
        Self { shared, workers, gate: Mutex::new(()) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for each `i` in `0..count`, in parallel.
    pub fn run(&self, count: usize, task: impl Fn(usize) + Sync) {
        if count <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..count).for_each(task);
            return;
        }
        let _gate = self.gate.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let erased: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime is erased; the loop below waits for every worker.
        let erased: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(erased) };
        {
            let mut job = shared.job.lock().expect("pool lock");
            shared.next.store(0, Ordering::Relaxed);
            shared.busy.store(self.workers.len(), Ordering::Relaxed);
            *job = Some(Job { task: erased, count });
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        INSIDE.set(true);
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drain(shared, &task, count)));
        INSIDE.set(false);
        let mut rounds = 0usize;
        while shared.busy.load(Ordering::Acquire) != 0 {
            rounds += 1;
            if rounds.is_multiple_of(1024) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        if let Err(payload) = own {
            std::panic::resume_unwind(payload);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }
}

fn drain(shared: &Shared, task: &(dyn Fn(usize) + Sync), count: usize) {
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= count {
            return;
        }
        task(index);
    }
}

fn worker(shared: &Shared) {
    INSIDE.set(true);
    let mut seen = 0usize;
    loop {
        let mut rounds = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && rounds < SPIN_ROUNDS {
            std::hint::spin_loop();
            rounds += 1;
        }
        let job = {
            let mut job = shared.job.lock().expect("pool lock");
            while shared.epoch.load(Ordering::Acquire) == seen {
                if shared.shutdown.load(Ordering::Relaxed) {
                    return;
                }
                job = shared.wake.wait(job).expect("pool lock");
            }
            seen = shared.epoch.load(Ordering::Acquire);
            *job
        };
        if let Some(Job { task, count }) = job {
            // SAFETY: `run` waits for `busy` to reach zero before the task dies.
            let task = unsafe { &*task };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drain(shared, task, count)));
            if done.is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        {
            let _job = self.shared.job.lock();
            self.shared.shutdown.store(true, Ordering::Relaxed);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ThreadPool;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_index_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads);
            for count in [0, 1, 3, 1000] {
                let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, |index| {
                    hits[index].fetch_add(1, Ordering::Relaxed);
                    pool.run(2, |_| {});
                });
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = ThreadPool::new(3);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, |index| assert!(index != 40, "deliberate"));
        }));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, |index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }
}
