//! Compiles the emulator, once for each state of its sources.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Build;

/// Why the emulator cannot be compiled here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    reason: String,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Unavailable {}

/// What is compiled beside the kernels; the checker only for its build.
const PARTS: [&str; 3] = ["fibers", "driver", "checker"];

/// The folder beside libcuda.so that holds the look-alike of cuBLAS.
pub(crate) const CUBLAS: &str = "cublas";

/// The program that runs kernels with mistakes, its source and its folder.
const BROKEN: &str = "broken";

/// One object file: its name, its source, and how it is compiled.
struct Unit {
    name: String,
    source: PathBuf,
    flags: Vec<&'static str>,
}

/// The folder that holds `libcuda.so` of `build`.
pub(crate) fn folder(build: Build) -> Result<PathBuf, Unavailable> {
    made(build.name(), "libcuda.so", |compiler, sources, folder| {
        compile(build, compiler, sources, folder);
    })
}

/// The program that runs kernels with mistakes under the checker.
pub(crate) fn broken() -> Result<PathBuf, Unavailable> {
    let folder = made(BROKEN, BROKEN, |compiler, _, folder| {
        let cpp = cpp();
        let unit = |name: &str, flags| {
            let source = cpp.join(format!("{name}.cpp"));
            compile_unit(compiler, &Unit { name: name.to_owned(), source, flags }, folder);
        };
        unit("fibers", vec!["-O2", "-DCUDA_EMULATOR_CHECK"]);
        unit("checker", vec!["-O2", "-DCUDA_EMULATOR_CHECK"]);
        unit(BROKEN, vec!["-O1", "-fsanitize=thread"]);
        let mut arguments = vec![OsString::from("-o"), folder.join(BROKEN).into()];
        arguments.extend([BROKEN, "fibers", "checker"].map(|name| object(folder, name).into()));
        arguments.push("-ldl".into());
        compiler.run(arguments);
    })?;
    Ok(folder.join(BROKEN))
}

/// The folder of that name, in which `compile` makes `product` unless it is there.
fn made(
    name: &str,
    product: &str,
    compile: impl FnOnce(&Compiler, &Sources, &Path),
) -> Result<PathBuf, Unavailable> {
    // Two threads would compile the same, and get in each other's way.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let compiler = Compiler::find()?;
    let sources = Sources::read();
    let hash = sources.hash(&compiler);
    let done = target().join("cuda-emulator").join(format!("{name}-{hash:016x}"));
    if done.join(product).exists() {
        return Ok(done);
    }
    // Made aside and then put in place whole: another process may be at it, too.
    let aside = done.with_extension(std::process::id().to_string());
    fs::create_dir_all(&aside).unwrap_or_else(|e| panic!("{}: {e}", aside.display()));
    eprintln!("compiling the CUDA emulator ({name} build) with {}", compiler.name());
    compile(&compiler, &sources, &aside);
    if fs::rename(&aside, &done).is_err() {
        // The other process was faster.
        let _ = fs::remove_dir_all(&aside);
        assert!(done.join(product).exists(), "{} could not be made", done.display());
    }
    Ok(done)
}

/// Where build results lie: the folder above that of the running test.
fn target() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let deps = program.ancestors().find(|folder| folder.ends_with("deps"));
    deps.and_then(Path::parent).map_or_else(std::env::temp_dir, Path::to_path_buf)
}

struct Compiler {
    program: OsString,
    version: String,
}

impl Compiler {
    fn find() -> Result<Self, Unavailable> {
        let asked = std::env::var_os("CXX").into_iter();
        let known = ["g++", "clang++", "c++"].map(OsString::from);
        for program in asked.chain(known) {
            let version = Command::new(&program).arg("--version").output();
            if let Ok(output) = version
                && output.status.success()
            {
                let version = String::from_utf8_lossy(&output.stdout).into_owned();
                return Ok(Self { program, version });
            }
        }
        let reason = "no C++ compiler: neither CXX nor g++, clang++ or c++ can be run";
        Err(Unavailable { reason: reason.to_owned() })
    }

    fn name(&self) -> &str {
        self.version.lines().next().unwrap_or_default()
    }

    /// Instructions that the emulated conversions and fused products are fast with.
    fn machine_flags() -> Vec<&'static str> {
        // What a kernel rounds twice stays rounded twice.
        let mut flags = vec!["-ffp-contract=off"];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("f16c") {
                flags.push("-mf16c");
            }
            if is_x86_feature_detected!("fma") {
                flags.push("-mfma");
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        flags.push("-DEMU_UCONTEXT");
        flags
    }

    fn run(&self, arguments: impl IntoIterator<Item = OsString>) {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} ended with {}:\n{messages}", output.status);
    }
}

/// Every file that the emulator is made of, by name.
struct Sources {
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Sources {
    fn read() -> Self {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folders =
            [package.join("cpp"), kernels(), package.join("../../crates/tinyserve-kernels/ptx")];
        let mut files = Vec::new();
        for folder in folders {
            let entries = fs::read_dir(&folder);
            let entries = entries.unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
                let known = path.extension().and_then(|extension| extension.to_str());
                if matches!(known, Some("cpp" | "h" | "cu" | "cuh" | "ptx")) {
                    let bytes = fs::read(&path);
                    let bytes = bytes.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                    files.push((path, bytes));
                }
            }
        }
        files.sort();
        Self { files }
    }

    fn hash(&self, compiler: &Compiler) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.files.hash(&mut hasher);
        compiler.version.hash(&mut hasher);
        Compiler::machine_flags().hash(&mut hasher);
        hasher.finish()
    }

    /// For each file of PTX, its name and the kernels in it.
    fn entries(&self) -> impl Iterator<Item = (&str, Vec<&str>)> {
        self.files.iter().filter_map(|(path, bytes)| {
            let name = path.file_name()?.to_str()?.strip_suffix(".ptx")?;
            let text = std::str::from_utf8(bytes).ok()?;
            Some((name, entries(text)))
        })
    }
}

/// Names of the kernels in `ptx`.
fn entries(ptx: &str) -> Vec<&str> {
    let after = ptx.split(".entry ").skip(1);
    after
        .filter_map(|rest| rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next())
        .collect()
}

fn cpp() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp")
}

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels")
}

fn compile(build: Build, compiler: &Compiler, sources: &Sources, folder: &Path) {
    let cpp = cpp();
    let checks = build == Build::Checker;
    let defined: &[&str] = if checks { &["-DCUDA_EMULATOR_CHECK"] } else { &[] };
    let mut units = Vec::new();
    for name in PARTS.into_iter().filter(|&name| checks || name != "checker") {
        let flags = ["-O2"].iter().chain(defined).copied().collect();
        units.push(Unit { name: name.to_owned(), source: cpp.join(format!("{name}.cpp")), flags });
    }
    for (name, entries) in sources.entries() {
        // A kernel joins the emulator's list by its name in the PTX: one that is there and not in
        // its source does not compile.
        let mut text = format!("#include \"{name}.cu\"\n");
        text.extend(entries.iter().map(|entry| format!("EMU_REGISTER({entry})\n")));
        let source = folder.join(format!("{name}.cpp"));
        fs::write(&source, text).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        let flags = if checks { vec!["-O1", "-fsanitize=thread"] } else { vec!["-O2"] };
        units.push(Unit { name: format!("kernel_{name}"), source, flags });
    }
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(units.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile_unit(compiler, unit, folder);
                }
            });
        }
    });
    // The name inside the library is what answers a later search for libcuda.so.
    let mut arguments: Vec<OsString> =
        ["-shared", "-Wl,-soname,libcuda.so", "-o"].map(OsString::from).to_vec();
    arguments.push(folder.join("libcuda.so").into());
    arguments.extend(units.iter().map(|unit| object(folder, &unit.name).into()));
    arguments.push("-ldl".into());
    compiler.run(arguments);
    // Apart, so that a process sees it only if it is told to.
    let cublas = folder.join(CUBLAS);
    fs::create_dir_all(&cublas).unwrap_or_else(|e| panic!("{}: {e}", cublas.display()));
    let mut arguments: Vec<OsString> =
        ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wl,-soname,libcublas.so", "-o"]
            .map(OsString::from)
            .to_vec();
    arguments.extend([cublas.join("libcublas.so").into(), cpp.join("cublas.cpp").into()]);
    compiler.run(arguments);
}

fn compile_unit(compiler: &Compiler, unit: &Unit, folder: &Path) {
    let common = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-w", "-c", "-I"];
    let mut arguments: Vec<OsString> = common.map(OsString::from).to_vec();
    arguments.extend([cpp().into(), "-I".into(), kernels().into()]);
    arguments.extend(Compiler::machine_flags().into_iter().map(OsString::from));
    arguments.extend(unit.flags.iter().map(OsString::from));
    arguments.extend([unit.source.clone().into(), "-o".into()]);
    arguments.push(object(folder, &unit.name).into());
    compiler.run(arguments);
}

fn object(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.o"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_entries() {
        let ptx = ".visible .entry first_f32(\n\t.param\n)\n{ ret; }\n.entry second() { }";
        assert_eq!(entries(ptx), ["first_f32", "second"]);
    }
}
