//! `cargo xtask induction-model`: a checkpoint folder whose model looks things up.

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use tinyserve_model::{InductionGeometry, InductionModel};

use crate::folder;

/// What to write, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How the codes of tokens lie: each key in a channel of its own, or random directions.
    #[arg(long, value_parser = geometry(), default_value = "outlier")]
    geometry: InductionGeometry,
    /// Folder to write: a new or an empty one.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

fn geometry() -> impl TypedValueParser<Value = InductionGeometry> {
    let all = InductionGeometry::ALL;
    PossibleValuesParser::new(all.map(InductionGeometry::name)).try_map(move |name| {
        let found = all.into_iter().find(|geometry| geometry.name() == name);
        found.ok_or("expected outlier or gaussian")
    })
}

/// Writes the folder.
pub(crate) fn run(args: &Args) -> Result<()> {
    let model = InductionModel::new(args.geometry);
    folder::create(&args.out, |folder| Ok(model.write(folder)?))?;
    println!(
        "{}: looks up 64 keys at distances up to 64K tokens, {} geometry",
        args.out.display(),
        args.geometry.name()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_a_checkpoint_with_its_tokens() {
        let home = tempfile::tempdir().unwrap();
        for geometry in InductionGeometry::ALL {
            let out = home.path().join(geometry.name());
            run(&Args { geometry, out: out.clone() }).unwrap();
            let checkpoint = tinyserve_model::Checkpoint::open(&out).unwrap();
            assert_eq!(checkpoint.config().layers, 2);
            let tokens = checkpoint.tokenizer().unwrap().encode("k07 v03 f012 n07", true).unwrap();
            let words = InductionModel::new(geometry).tokens();
            let expected = [words.keys[7], words.values[3], words.fillers[12], words.near_keys[7]];
            assert_eq!(tokens, expected);
            let again = run(&Args { geometry, out }).unwrap_err().to_string();
            assert!(again.contains("not empty"), "{again}");
        }
    }
}
