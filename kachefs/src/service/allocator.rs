//! What rustc's allocator is told: in how many arenas to keep memory, and of what pages to make it.
//!
//! A tenth of a rustc's time goes into first uses of memory, page by page. Its allocator is jemalloc, which has four
//! arenas for each processor (jemalloc(3), `opt.narenas`), and gives each thread that generates code one that nobody
//! has used yet. With one for each processor they use what others have left. And where memory lies ready in large
//! pieces, large pages (`opt.thp`) take one fault for what took five hundred. To make such pieces the kernel moves what
//! is in the way, which takes longer than that saves; so they are asked for only while there are plenty. What is given
//! back would split them: it is kept to the end.
//!
//! None of it changes what is compiled, and no program gets to know (`wrapper::trace::Program`). Of a rustc with
//! another allocator, and of what the user has set, nothing changes.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::thread;

use wrapper::trace::ALLOCATOR_IS_TOLD;

/// How much memory lies ready, in pieces of each size (proc(5)).
const READY: &str = "/proc/buddyinfo";

/// Where control groups are, by which memory may be limited (cgroups(7)).
const GROUPS: &str = "/sys/fs/cgroup";

/// The size of a large page on x86-64, as a power of two of pages: 2 MiB.
const LARGE: usize = 9;
const LARGE_SIZE: u64 = 2 << 20;

/// How many large pages are plenty, for each processor: a GiB, which is more than most compiles take.
const PLENTY: u64 = 512;

/// The value of the variable that tells it.
pub(super) fn told() -> Vec<u8> {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let plenty = PLENTY * processors as u64;
    let ready = fs::read_to_string(READY).map_or(0, |text| large_pages(&text));
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let pages = if ready >= plenty && is_allowed(plenty * LARGE_SIZE, &own, Path::new(GROUPS)) {
        ",thp:always,dirty_decay_ms:-1"
    } else {
        ""
    };
    format!("{ALLOCATOR_IS_TOLD}{processors}{pages}").into_bytes()
}

/// How many large pages can be made of what lies ready.
fn large_pages(ready: &str) -> u64 {
    // `Node 0, zone   Normal  10379   9845 …`: how many pieces of one page, of two, of four there are.
    let pieces = ready.lines().flat_map(|line| {
        let sizes = line.split_whitespace().skip(4).enumerate();
        sizes.filter_map(|(size, pieces)| {
            let pages = 1_u64 << size.checked_sub(LARGE)?;
            pieces.parse::<u64>().ok()?.checked_mul(pages)
        })
    });
    pieces.fold(0, u64::saturating_add)
}

/// Whether the control groups of a process, as it is told them, let it have so many bytes more. In a container, what
/// lies ready is the whole machine's.
fn is_allowed(bytes: u64, own: &str, groups: &Path) -> bool {
    let mut limits = own.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        // Of the second version there is one for everything, which names no controllers.
        let (directory, limit, used) = match parts.next() {
            Some("") => (groups.to_owned(), "memory.max", "memory.current"),
            _ => (
                groups.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
        };
        let own = Path::new(parts.next().unwrap_or_default());
        // One that contains others limits them, and in a container the outermost may be its own.
        own.ancestors().map(move |group| {
            let group = directory.join(group.strip_prefix("/").unwrap_or(group));
            let number = |name| {
                fs::read_to_string(group.join(name))
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            };
            // No limit is a word.
            number(limit).map(|limit: u64| limit.saturating_sub(number(used).unwrap_or(limit)))
        })
    });
    limits.all(|left| left.is_none_or(|left| left >= bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_groups_leave_is_what_there_is() {
        const GIB: u64 = 1 << 30;
        let dir = tempfile::tempdir().expect("tempdir");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).expect("mkdir");
            fs::write(path, text).expect("writes");
        };
        let allowed = |own: &str| is_allowed(GIB, own, dir.path());
        let [second, first] = ["0::/a/b\n", "7:cpu:/x\n4:memory:/c/d\n"];
        assert!(allowed("") && allowed(second) && allowed(first));
        write("a/b/memory.max", "max\n");
        write("a/memory.max", "4294967296\n");
        write("a/memory.current", "1073741824\n");
        write("memory/c/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/c/memory.usage_in_bytes", "1073741824\n");
        assert!(allowed(second) && allowed(first));
        write("a/memory.current", "3758096384\n");
        assert!(!allowed(second) && allowed("0::/b\n"));
        write("memory/memory.limit_in_bytes", "2147483648\n");
        write("memory/memory.usage_in_bytes", "2147483648\n");
        assert!(!allowed(first) && allowed("0::/b\n"));
        // Who limits and does not tell what is used.
        write("memory.max", "2147483648\n");
        assert!(!allowed("0::/b\n"));
    }

    #[test]
    fn only_large_pieces_make_large_pages() {
        let full = "Node 0, zone    DMA32      4      1      2      2      2      2      1      4      4      2    752 \n\
                    Node 0, zone   Normal  10379   9845   6373   3959   1714    546    187     55     28     23    861 \n";
        assert_eq!(large_pages(full), 2 + 2 * 752 + 23 + 2 * 861);
        let in_pieces = "Node 0, zone   Normal  99999   9845   6373   3959   1714   1881   1963    762     59      0      0 \n";
        assert_eq!(large_pages(in_pieces), 0);
        for strange in [
            "",
            "Node",
            "Node 0, zone Normal a b c d e f g h i j k",
            "Node 0, zone Normal 1 2",
        ] {
            assert_eq!(large_pages(strange), 0, "{strange}");
        }
    }
}
