//! What the process holds: live bytes, resident bytes, open files.

use std::{alloc::System, fs};

use cap::Cap;

/// Counts every byte. `unsafe` is forbidden here, so it is a crate's: `cap` has one counter and
/// one figure, the bytes that are allocated now, without a lock.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Vitals {
    pub(crate) live_bytes: usize,
    pub(crate) resident_bytes: u64,
    pub(crate) open_files: usize,
}

impl Vitals {
    /// Resident bytes and open files are 0 where there is no `/proc`.
    pub(crate) fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        let open_files = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        Self {
            live_bytes: ALLOCATOR.allocated(),
            resident_bytes: resident.unwrap_or(0_u64) * 1024,
            open_files,
        }
    }
}
