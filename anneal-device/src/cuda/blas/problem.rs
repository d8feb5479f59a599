//! A product as plain data: what tells problems apart, and how the library sees them.
//!
//! cuBLASLt thinks in columns. A row-major matrix is, byte for byte, its transpose in column-major order, so
//! `C = A B` in rows is `C^T = B^T A^T` in columns: the operands change places, and an operand that is stored
//! as it is used stays untransposed.

use super::Batch;
use crate::cpu::ElementType;

/// Stricter alignments than this many bytes, the widest access of a thread and the unit of the bulk copies,
/// are not told apart.
const WIDEST: usize = 16;

/// How an operand lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Side {
    /// Elements between the starts of stored rows.
    pub leading: usize,
    /// Whether the transpose is stored.
    pub transposed: bool,
    /// Bytes that the address is a multiple of; in a batch every address.
    pub alignment: usize,
}

/// What follows the product, without its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Plain,
    Gelu,
    /// GELU, and its argument is kept.
    GeluKept,
    /// Sums of A's rows beside the product.
    RowSums,
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// Of both operands.
    pub element: ElementType,
    /// Of C, the bias and what an epilogue writes.
    pub output: ElementType,
    pub a: Side,
    pub b: Side,
    pub c: Side,
    pub accumulate: bool,
    /// The alignment of the bias, if there is one.
    pub bias: Option<usize>,
    pub kind: Kind,
    /// The alignment of what the epilogue writes besides C.
    pub extra: Option<usize>,
    pub tf32: bool,
    pub batch: Batch,
}

/// A column-major matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub rows: usize,
    pub columns: usize,
    pub leading: usize,
}

/// The library's view: `D = op(first) op(second)`, all column-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ColumnMajor {
    /// Our B, and whether it enters transposed.
    pub first: (Layout, bool),
    /// Our A.
    pub second: (Layout, bool),
    /// Our C.
    pub output: Layout,
}

/// The power of two that an address, and all at multiples of `distance` bytes from it, are multiples of, up to
/// [`WIDEST`].
pub(super) fn alignment(address: *const u8, distance: usize) -> usize {
    1 << (address as usize | distance | WIDEST).trailing_zeros()
}

impl Problem {
    pub fn column_major(&self) -> ColumnMajor {
        // A stored matrix [r, c] in rows is [c, r] in columns.
        let stored = |side: Side, rows: usize, columns: usize| {
            let (rows, columns) = if side.transposed { (columns, rows) } else { (rows, columns) };
            (Layout { rows: columns, columns: rows, leading: side.leading }, side.transposed)
        };
        ColumnMajor {
            first: stored(self.b, self.depth, self.columns),
            second: stored(self.a, self.rows, self.depth),
            output: stored(self.c, self.rows, self.columns).0,
        }
    }

    /// A name that is different for different problems, and fit for a file. How far apart the products of a batch lie is no
    /// part of it, so that equal layouts at other distances share a choice.
    pub fn name(&self) -> String {
        let element = |element| match element {
            ElementType::F32 => "f32",
            ElementType::Bf16 => "bf16",
            ElementType::F16 => "f16",
        };
        let side = |side: Side| {
            format!("{}{}{}", side.leading, if side.transposed { "t" } else { "n" }, side.alignment)
        };
        let mut name = format!(
            "{}-{}-{}x{}x{}-a{}-b{}-c{}",
            element(self.element),
            element(self.output),
            self.rows,
            self.columns,
            self.depth,
            side(self.a),
            side(self.b),
            side(self.c),
        );
        if let Some(alignment) = self.bias {
            name += &format!("-bias{alignment}");
        }
        name += match self.kind {
            Kind::Plain => "",
            Kind::Gelu => "-gelu",
            Kind::GeluKept => "-gelukept",
            Kind::RowSums => "-rowsums",
        };
        if let Some(alignment) = self.extra {
            name += &alignment.to_string();
        }
        for (set, word) in [(self.accumulate, "-add"), (self.tf32, "-tf32")] {
            if set {
                name += word;
            }
        }
        let Batch { count, a, b, .. } = self.batch;
        if count > 1 {
            name += &format!("-batch{count}");
            for (distance, word) in [(a, "-onea"), (b, "-oneb")] {
                name += if distance == 0 { word } else { "" };
            }
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(a_transposed: bool, b_transposed: bool) -> Problem {
        let (rows, columns, depth) = (3, 4, 5);
        let side = |transposed, rows, columns: usize, padding| {
            let width = if transposed { rows } else { columns };
            Side { leading: width + padding, transposed, alignment: 16 }
        };
        Problem {
            rows,
            columns,
            depth,
            element: ElementType::Bf16,
            output: ElementType::F32,
            a: side(a_transposed, rows, depth, 2),
            b: side(b_transposed, depth, columns, 1),
            c: side(false, rows, columns, 3),
            accumulate: false,
            bias: None,
            kind: Kind::Plain,
            extra: None,
            tf32: false,
            batch: Batch::ONE,
        }
    }

    /// A row-major matrix in memory, as a side says; entries are `value(row, column)`.
    fn stored(side: Side, rows: usize, columns: usize, value: impl Fn(usize, usize) -> i64) -> Vec<i64> {
        let outer = if side.transposed { columns } else { rows };
        let mut memory = vec![i64::MIN; outer * side.leading];
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            let (i, j) = if side.transposed { (column, row) } else { (row, column) };
            memory[i * side.leading + j] = value(row, column);
        }
        memory
    }

    #[test]
    fn the_librarys_view_gives_the_row_major_product() {
        for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
            let problem = problem(a_transposed, b_transposed);
            let (a_at, b_at) = (|i: usize, p: usize| (7 * i + 3 * p) as i64, |p, j| (p * p + 11 * j) as i64);
            let a = stored(problem.a, problem.rows, problem.depth, a_at);
            let b = stored(problem.b, problem.depth, problem.columns, b_at);
            let view = problem.column_major();
            let at = |memory: &[i64], (layout, transposed): (Layout, bool), row: usize, column: usize| {
                let (i, j) = if transposed { (column, row) } else { (row, column) };
                assert!(i < layout.rows && j < layout.columns && layout.leading >= layout.rows);
                memory[j * layout.leading + i]
            };
            assert_eq!((view.output.rows, view.output.columns), (problem.columns, problem.rows));
            for (row, column) in (0..problem.rows).flat_map(|i| (0..problem.columns).map(move |j| (i, j))) {
                // Entry (column, row) of the library's output is our (row, column).
                let got: i64 = (0..problem.depth)
                    .map(|p| at(&b, view.first, column, p) * at(&a, view.second, p, row))
                    .sum();
                let expected: i64 = (0..problem.depth).map(|p| a_at(row, p) * b_at(p, column)).sum();
                assert_eq!(got, expected);
            }
        }
    }

    #[test]
    fn different_problems_have_different_names() {
        let plain = problem(false, true);
        let variants = [
            plain,
            problem(true, false),
            Problem { accumulate: true, ..plain },
            Problem { tf32: true, ..plain },
            Problem { bias: Some(2), ..plain },
            Problem { bias: Some(16), ..plain },
            Problem { kind: Kind::Gelu, ..plain },
            Problem { kind: Kind::GeluKept, extra: Some(16), ..plain },
            Problem { kind: Kind::RowSums, extra: Some(16), ..plain },
            Problem { output: ElementType::Bf16, ..plain },
            Problem { c: Side { alignment: 4, ..plain.c }, ..plain },
            Problem { rows: 33, ..plain },
            Problem { batch: Batch { count: 2, a: 0, b: 30, c: 32, bias: 0 }, ..plain },
            Problem { batch: Batch { count: 2, a: 30, b: 0, c: 32, bias: 0 }, ..plain },
            Problem { batch: Batch { count: 2, a: 30, b: 30, c: 32, bias: 0 }, ..plain },
            Problem { batch: Batch { count: 3, a: 0, b: 30, c: 32, bias: 0 }, ..plain },
        ];
        let names: std::collections::BTreeSet<String> = variants.iter().map(Problem::name).collect();
        assert_eq!(names.len(), variants.len());
        assert_eq!(plain.name(), "bf16-f32-3x4x5-a7n16-b6t16-c7n16");
        let batch = |b, c| Problem { batch: Batch { count: 28, a: 0, b, c, bias: 0 }, ..plain };
        assert_eq!(batch(30, 32).name(), "bf16-f32-3x4x5-a7n16-b6t16-c7n16-batch28-onea");
        assert_eq!(batch(30, 32).name(), batch(64, 48).name());
        assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')));
    }

    #[test]
    fn alignment_is_the_addresss_own_up_to_the_widest_access() {
        let found: Vec<usize> =
            [0, 2, 4, 6, 8, 16, 24, 512].map(|address| alignment(address as *const u8, 0)).into();
        assert_eq!(found, [16, 2, 4, 2, 8, 16, 8, 16]);
        assert_eq!([0, 4, 32].map(|distance| alignment(512 as *const u8, distance)), [16, 4, 16]);
    }
}
