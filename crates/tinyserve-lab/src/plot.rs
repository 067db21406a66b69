//! Pictures as SVG.

use plotters::coord::Shift;
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

/// Lines over a logarithmic x axis. Points at x ≤ 0 or without a finite y are left out.
///
/// # Errors
/// When no point is left, or the drawing library fails.
pub fn lines(
    title: &str,
    (x_name, y_name): (&str, &str),
    lines: &[Line],
) -> Result<String, LabError> {
    let usable = |&&(x, y): &&(f64, f64)| x > 0.0 && x.is_finite() && y.is_finite();
    let points = || lines.iter().flat_map(|line| line.points.iter().filter(usable));
    let span = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), x| (lo.min(x), hi.max(x)))
    };
    let (x_low, x_high) = span(&mut points().map(|p| p.0));
    let (y_low, y_high) = span(&mut points().map(|p| p.1));
    if x_low > x_high {
        return Err(LabError::Plot("there is nothing to draw".to_owned()));
    }
    // A single value still needs an axis around it.
    let (x_low, x_high) =
        if x_low == x_high { (x_low / 2.0, x_high * 2.0) } else { (x_low, x_high) };
    let room = if y_low == y_high { 0.5 } else { 0.05 * (y_high - y_low) };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (860, 480)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d((x_low..x_high).log_scale(), y_low - room..y_high + room)
            .map_err(failed)?;
        // Marks are powers of ten: whole ones need no point.
        let mark = |x: &f64| if *x < 1.0 { x.to_string() } else { format!("{x:.0}") };
        let mut mesh = chart.configure_mesh();
        mesh.x_label_formatter(&mark).x_desc(x_name).y_desc(y_name).draw().map_err(failed)?;
        for (i, line) in lines.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            // The second round of colours has thin lines.
            let style = colour.stroke_width(if i < COLOURS.len() { 2 } else { 1 });
            let points: Vec<_> = line.points.iter().filter(usable).copied().collect();
            let dots = points.iter().map(|&point| Circle::new(point, 3, colour.filled()));
            chart.draw_series(dots).map_err(failed)?;
            chart
                .draw_series(LineSeries::new(points, style))
                .map_err(failed)?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
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
