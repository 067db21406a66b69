//! Pictures as SVG.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::LabError;

/// Colours of lines, told apart by most eyes (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(150, 150, 150),
];

/// A named line.
#[derive(Debug, Clone)]
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// Its points, in order of x.
    pub points: Vec<(f64, f64)>,
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::Plot(error.to_string())
}

/// What the axes of a picture of lines are called.
#[derive(Debug, Clone, Copy)]
pub struct Axes<'a> {
    /// From left to right; logarithmic where the points span a decade.
    pub x: &'a str,
    /// From bottom to top.
    pub y: &'a str,
    /// Whether y is logarithmic, too: points at y ≤ 0 are then left out.
    pub log_y: bool,
}

/// Lines and the points that they join. Points at x ≤ 0 or without a finite y are left out.
///
/// # Errors
/// When no point is left, or the drawing library fails.
pub fn lines(title: &str, axes: Axes<'_>, lines: &[Line]) -> Result<String, LabError> {
    let usable = |&(x, y): &(f64, f64)| {
        x > 0.0 && x.is_finite() && y.is_finite() && (y > 0.0 || !axes.log_y)
    };
    let usable = |line: &Line| Line {
        name: line.name.clone(),
        points: line.points.iter().copied().filter(usable).collect(),
    };
    let lines: Vec<Line> =
        lines.iter().map(usable).filter(|line| !line.points.is_empty()).collect();
    let span = |of: fn(&(f64, f64)) -> f64| {
        let values = lines.iter().flat_map(|line| &line.points).map(of);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), x| (lo.min(x), hi.max(x)))
    };
    let ((x_low, x_high), (y_low, y_high)) = (span(|p| p.0), span(|p| p.1));
    if x_low > x_high {
        return Err(LabError::Plot("there is nothing to draw".to_owned()));
    }
    // A single value still needs an axis around it.
    let x = if x_low == x_high { x_low / 2.0..x_high * 2.0 } else { x_low..x_high };
    let room = if y_low == y_high { 0.5 } else { 0.05 * (y_high - y_low) };
    let y = if axes.log_y { y_low / 1.2..y_high * 1.2 } else { y_low - room..y_high + room };
    // A shorter logarithmic axis would have one mark, or none.
    let log_x = x.end / x.start >= DECADE;
    let names = emptier_corner(&lines, (&x, log_x), (&y, axes.log_y));
    let picture = Picture { title, axes, lines: &lines, names };
    match (log_x, axes.log_y) {
        (true, true) => picture.draw(x.log_scale(), y.log_scale()),
        (true, false) => picture.draw(x.log_scale(), y),
        (false, true) => picture.draw(x, y.log_scale()),
        (false, false) => picture.draw(x, y),
    }
}

/// From the least to the largest x, where marks at powers of ten say enough.
const DECADE: f64 = 10.0;

/// Which of the two right corners has fewer points.
fn emptier_corner(
    lines: &[Line],
    (x, log_x): (&Range<f64>, bool),
    (y, log_y): (&Range<f64>, bool),
) -> SeriesLabelPosition {
    let place = |value: f64, axis: &Range<f64>, log: bool| {
        let of = |value: f64| if log { value.ln() } else { value };
        (of(value) - of(axis.start)) / (of(axis.end) - of(axis.start))
    };
    let right = lines.iter().flat_map(|line| &line.points).filter(|p| place(p.0, x, log_x) > 0.6);
    let upper = right.map(|p| if place(p.1, y, log_y) > 0.5 { 1 } else { -1 });
    if upper.sum::<i32>() < 0 {
        SeriesLabelPosition::UpperRight
    } else {
        SeriesLabelPosition::LowerRight
    }
}

struct Picture<'a> {
    title: &'a str,
    axes: Axes<'a>,
    lines: &'a [Line],
    /// Where the names of the lines stand.
    names: SeriesLabelPosition,
}

impl Picture<'_> {
    fn draw<X, Y>(&self, x: X, y: Y) -> Result<String, LabError>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (860, 480)).into_drawing_area();
            root.fill(&WHITE).map_err(failed)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(self.title, ("sans-serif", 18))
                .margin(12)
                .x_label_area_size(44)
                .y_label_area_size(64)
                .build_cartesian_2d(x, y)
                .map_err(failed)?;
            let mark = |x: &f64| mark(*x);
            let mut mesh = chart.configure_mesh();
            mesh.x_label_formatter(&mark).y_label_formatter(&mark);
            mesh.x_desc(self.axes.x).y_desc(self.axes.y).draw().map_err(failed)?;
            for (i, line) in self.lines.iter().enumerate() {
                let colour = COLOURS[i % COLOURS.len()];
                // The second round of colours has rings and thin lines.
                let again = i >= COLOURS.len();
                let stroke = colour.stroke_width(if again { 1 } else { 2 });
                let dot = if again { stroke } else { colour.filled() };
                let dots = line.points.iter().map(|&point| Circle::new(point, 4, dot));
                chart.draw_series(dots).map_err(failed)?;
                chart
                    .draw_series(LineSeries::new(line.points.iter().copied(), stroke))
                    .map_err(failed)?
                    .label(line.name.clone())
                    .legend(move |(x, y)| {
                        EmptyElement::at((x, y))
                            + PathElement::new([(0, 0), (18, 0)], stroke)
                            + Circle::new((9, 0), 4, dot)
                    });
            }
            chart
                .configure_series_labels()
                .position(self.names.clone())
                .background_style(WHITE.mix(0.85))
                .border_style(BLACK.mix(0.3))
                .draw()
                .map_err(failed)?;
            root.present().map_err(failed)?;
        }
        Ok(svg)
    }
}

/// A number beside a mark of an axis: marks are a few digits long, sums of them may not be.
fn mark(x: f64) -> String {
    ((x * 1e6).round() / 1e6).to_string()
}

/// One heat map for each name: rows from top to bottom, columns from left to right, each value from
/// 0 (red) to 1 (green); `None` is grey.
///
/// # Errors
/// When there is no map, or the drawing library fails.
pub fn heat_maps(
    title: &str,
    (columns, rows): (&[String], &[String]),
    maps: &[(String, Vec<Vec<Option<f64>>>)],
) -> Result<String, LabError> {
    if maps.is_empty() || columns.is_empty() || rows.is_empty() {
        return Err(LabError::Plot("there is nothing to draw".to_owned()));
    }
    let across = maps.len().min(4);
    let down = maps.len().div_ceil(across);
    let size = (230 * across as u32 + 20, 250 * down as u32 + 50);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let body = root.titled(title, ("sans-serif", 18)).map_err(failed)?;
        for (panel, (name, map)) in body.split_evenly((down, across)).iter().zip(maps) {
            draw_map(panel, (columns, rows), name, map)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn draw_map(
    panel: &DrawingArea<SVGBackend<'_>, Shift>,
    (columns, rows): (&[String], &[String]),
    name: &str,
    map: &[Vec<Option<f64>>],
) -> Result<(), LabError> {
    let label = |i: &usize, names: &[String]| names.get(*i).cloned().unwrap_or_default();
    let mut chart = ChartBuilder::on(panel)
        .caption(name, ("sans-serif", 14))
        .margin(6)
        .x_label_area_size(24)
        .y_label_area_size(44)
        .build_cartesian_2d(
            (0..columns.len() - 1).into_segmented(),
            (0..rows.len() - 1).into_segmented(),
        )
        .map_err(failed)?;
    let name_of = |segment: &SegmentValue<usize>, names: &[String]| match segment {
        SegmentValue::Exact(i) | SegmentValue::CenterOf(i) => label(i, names),
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(columns.len())
        .y_labels(rows.len())
        .x_label_formatter(&|x| name_of(x, columns))
        // The first row is on top.
        .y_label_formatter(&|y| match y {
            SegmentValue::Exact(i) | SegmentValue::CenterOf(i) => {
                label(&(rows.len() - 1 - (*i).min(rows.len() - 1)), rows)
            }
            SegmentValue::Last => String::new(),
        })
        .draw()
        .map_err(failed)?;
    let cells = map.iter().enumerate().flat_map(|(row, values)| {
        let y = rows.len() - 1 - row;
        values.iter().enumerate().map(move |(x, value)| {
            let corners = [
                (SegmentValue::Exact(x), SegmentValue::Exact(y)),
                (edge(x + 1, values.len()), edge(y + 1, map.len())),
            ];
            Rectangle::new(corners, colour(*value).filled())
        })
    });
    chart.draw_series(cells).map_err(failed)?;
    Ok(())
}

fn edge(i: usize, length: usize) -> SegmentValue<usize> {
    if i >= length { SegmentValue::Last } else { SegmentValue::Exact(i) }
}

/// From red over yellow to green.
fn colour(value: Option<f64>) -> RGBColor {
    let Some(value) = value else { return RGBColor(200, 200, 200) };
    let value = value.clamp(0.0, 1.0);
    let mix = |a: f64, b: f64, t: f64| (a + (b - a) * t).round() as u8;
    let (low, high, t) = if value < 0.5 {
        ([200.0, 60.0, 50.0], [245.0, 210.0, 90.0], 2.0 * value)
    } else {
        ([245.0, 210.0, 90.0], [40.0, 150.0, 90.0], 2.0 * value - 1.0)
    };
    RGBColor(mix(low[0], high[0], t), mix(low[1], high[1], t), mix(low[2], high[2], t))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(points: &[(f64, f64)], log_y: bool, count: usize) -> Result<String, LabError> {
        let line = |i| Line { name: format!("line {i}"), points: points.to_vec() };
        let all: Vec<Line> = (0..count).map(line).collect();
        lines("title", Axes { x: "across", y: "up", log_y }, &all)
    }

    #[test]
    fn a_short_axis_has_marks_between_the_powers_of_ten() {
        let svg = drawn(&[(0.45, 4.0), (0.95, 5.0)], false, 1).unwrap();
        for mark in ["0.5", "0.6", "0.9", "4.2"] {
            assert!(svg.contains(&format!("\n{mark}\n")), "{mark} is not in {svg}");
        }
        let long = drawn(&[(64.0, 1.0), (131_072.0, 5.0)], false, 1).unwrap();
        assert!(["100", "1000", "10000"].iter().all(|mark| long.contains(&format!("\n{mark}\n"))));
    }

    #[test]
    fn more_lines_than_colours_are_told_apart_by_rings() {
        let rings = |count| {
            let svg = drawn(&[(1.0, 1.0)], false, count).unwrap();
            svg.matches("<circle").count() - svg.matches("stroke=\"none\" stroke").count()
        };
        // Each line has a dot and one beside its name.
        assert_eq!(rings(12) - rings(8), 2 * 4);
    }

    #[test]
    fn what_a_logarithm_cannot_show_is_left_out() {
        let points = [(1.0, 0.0), (2.0, 0.001), (3.0, 0.1)];
        assert!(drawn(&points, true, 1).unwrap().contains("\n0.01\n"));
        assert!(drawn(&points[..1], true, 1).is_err(), "nothing is left");
        assert!(drawn(&[(1.0, f64::NAN), (-1.0, 1.0)], false, 1).is_err());
    }
}
