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
use std::thread;

use wrapper::trace::ALLOCATOR_IS_TOLD;

/// How much memory lies ready, in pieces of each size (proc(5)).
const READY: &str = "/proc/buddyinfo";

/// The size of a large page on x86-64, as a power of two of pages: 2 MiB.
const LARGE: usize = 9;

/// How many large pages are plenty, for each processor: a GiB, which is more than most compiles take.
const PLENTY: u64 = 512;

/// The value of the variable that tells it.
pub(super) fn told() -> Vec<u8> {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let ready = fs::read_to_string(READY).map_or(0, |text| large_pages(&text));
    let pages = if ready >= PLENTY * processors as u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

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
