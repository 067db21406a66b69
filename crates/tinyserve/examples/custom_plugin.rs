//! A page selector and a stop rule of one's own.

use std::sync::Arc;

use tinyserve::kv::{PageSelector, SelectInput};
use tinyserve::plugins::Action;
use tinyserve::{TinyServe, TinyServeError, TinyServeRequest};

/// Reads the first page, the last two, and every page whose keys lie far apart.
struct SinkWindowAndWide {
    width: f32,
}

impl PageSelector for SinkWindowAndWide {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let pages = input.page_count();
        let widest = |page| {
            let sides = input.max(page).iter().zip(input.min(page)).map(|(max, min)| max - min);
            sides.fold(0.0, f32::max)
        };
        let reads = |&page: &usize| page == 0 || page + 2 >= pages || widest(page) > self.width;
        selected.extend((0..pages).filter(reads).map(|page| page as u32));
        true
    }
}

fn main() -> Result<(), TinyServeError> {
    let selector = Arc::new(SinkWindowAndWide { width: 5.0 });
    let engine = TinyServe::builder().page_size(8).selector(selector).build()?;

    // Ends an answer after its third sentence.
    let tokenizer = engine.tokenizer()?.clone();
    engine.plugins().register_fn("three_sentences", move |ctx| {
        let sentences = tokenizer.decode(ctx.generated(), true)?.matches('.').count();
        let enough = sentences >= 3;
        Ok::<_, tinyserve::model::ModelError>(if enough {
            Action::stop("three sentences")
        } else {
            Action::Continue
        })
    })?;

    let request = TinyServeRequest::new("Once upon a time").max_tokens(200).temperature(0.0);
    let response = engine.serve(request)?;
    println!("{}", response.generated_text);
    assert_eq!(response.generated_text.matches('.').count(), 3);
    assert_eq!(response.stop_reason.as_deref(), Some("three sentences"));
    // A selector of one's own looks at every box, so it never reads what dense attention reads.
    let ratio = response.kv.bytes_read_ratio.unwrap_or(1.0);
    println!("read {:.0} % of the bytes of dense attention, boxes included", 100.0 * ratio);
    assert_ne!(ratio, 1.0);
    Ok(())
}

#[test]
fn it_runs() {
    main().unwrap();
}
