"""Compiles entry points of `kernels` with Numba to object files; a program of its own, started by `jit` and `objects`.

Numba would optimize every function before it is linked into the next one, and load it into this process. Here its code
generator keeps what it generates as it is; all functions of an entry point are linked once and optimized together. That
takes a third of the time, and works for processors other than this one. As this changes Numba for the whole process,
the process does nothing else: python -m tinystories.engine.cpu.compiler JSON, where JSON is `Request` as an object. It
writes a line of JSON and the object file to standard output.
"""

import json
import sys
from typing import Any, NamedTuple

ENTRY_POINTS = ("fp32", "int8", "int8-a8", "int4", "sample")  # the forward pass in each precision, and sampling
# What LLVM may turn into a call of the C library, on processors without an instruction for it.
LIBRARY_CALLS = {"llvm.memset": "memset", "llvm.rint.f32": "rintf", "llvm.ceil.f64": "ceil"}


class Request(NamedTuple):
    """What to compile. `triple`, `processor` and `features` are LLVM's names; without them, Numba's variables count."""

    entry_point: str
    triple: str | None = None
    processor: str = ""
    features: str = ""


def compile_entry_point(request: Request) -> bytes:
    """Return a line of JSON and an object file. The JSON has the `symbol` of the entry point and its external `calls`.

    The same request to the same versions of Python, NumPy, Numba and llvmlite gives the same bytes.
    """
    import llvmlite.binding as llvm

    target_machine = prepare_numba(request)
    from tinystories.engine.cpu.kernels.forward import make_entry_point
    from tinystories.engine.cpu.kernels.sampling import make_sampling_entry_point

    is_sampling = request.entry_point == "sample"
    entry = make_sampling_entry_point() if is_sampling else make_entry_point(request.entry_point)
    module = link_libraries(entry._library)
    symbol = f"tinystories_{request.entry_point}"
    add_wrapper(module, entry.native_name.removeprefix("cfunc."), symbol)
    hide_and_number(module, symbol)
    module.data_layout = str(target_machine.target_data)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization, tuning.slp_vectorization = True, False
    pass_builder = llvm.create_pass_builder(target_machine, tuning)
    pass_builder.getModulePassManager().run(module, pass_builder)
    declared = [function.name for function in module.functions if function.is_declaration]
    calls = {name for name in declared if not name.startswith("llvm.")}
    assert calls <= {"sched_yield"}, calls  # in particular nothing of Numba's runtime: no kernel owns memory or raises
    calls |= {call for intrinsic, call in LIBRARY_CALLS.items() if any(name.startswith(intrinsic) for name in declared)}
    header = json.dumps({"symbol": symbol, "calls": sorted(calls)})
    return header.encode() + b"\n" + target_machine.emit_object(module)


def prepare_numba(request: Request) -> Any:
    """Make Numba generate code for the target of a request, unoptimized and without loading it.

    Returns LLVM's target machine.
    """
    import llvmlite.binding as llvm
    from numba.core import callconv, codegen
    from numba.core.registry import cpu_target
    from numba.core.runtime.context import NRTContext

    class Library(codegen.JITCodeLibrary):
        def _optimize_functions(self, module: Any) -> None:
            pass

        def add_linking_library(self, library: Any) -> None:
            if isinstance(library, Library):  # not Numba's runtime
                self._linking_libraries.append(library)  # Numba would link and optimize it first

        def get_pointer_to_function(self, name: str) -> int:  # noqa: ARG002
            return 0

    class Codegen(codegen.JITCPUCodegen):
        _library_class = Library

        def _create_empty_module(self, name: str) -> Any:
            module = super()._create_empty_module(name)
            if request.triple:
                module.triple = request.triple
            return module

        def _add_module(self, module: Any) -> None:
            pass

        def set_env(self, env_name: str, env: Any) -> None:
            pass

        def magic_tuple(self) -> tuple[str, str, str]:  # asked by `simd.has_feature`
            triple, processor, features = super().magic_tuple()
            return (
                (request.triple, request.processor, request.features)
                if request.triple
                else (triple, processor, features)
            )

    context = cpu_target.target_context
    context._internal_codegen = native = Codegen("tinystories")
    # Kernels own no memory, so nothing counts references; they raise nothing, so no messages name the source files.
    NRTContext._call_incref_decref = lambda *_args, **_options: None
    callconv.CPUCallConv.set_static_user_exc = lambda *_args, **_options: None
    if request.triple is None:
        return native._tm
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(request.triple).create_target_machine(
        request.processor, request.features, opt=3, reloc="pic", codemodel="small"
    )


def link_libraries(library: Any) -> Any:
    """Link the module of a function and those of all functions that it calls, each once; return the LLVM module."""
    module, pending, linked = library._final_module, list(library._linking_libraries), set()
    while pending:
        callee = pending.pop(0)
        if callee not in linked:
            linked.add(callee)
            module.link_in(callee._final_module, preserve=True)
            pending += callee._linking_libraries
    return module


def add_wrapper(module: Any, name: str, symbol: str) -> None:
    """Add a C function `symbol` that calls a function of Numba, whose first two arguments are for errors."""
    import llvmlite.binding as llvm

    kinds = [str(argument.type) for argument in module.get_function(name).arguments]
    parameters = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(kinds[2:]))
    module.link_in(
        llvm.parse_assembly(f"""
            target triple = "{module.triple}"
            declare i32 @"{name}"({", ".join(kinds)})
            define void @{symbol}({parameters}) {{
                %result = alloca ptr
                %error = alloca ptr
                call i32 @"{name}"(ptr %result, ptr %error, {parameters})
                ret void
            }}
        """)
    )


def hide_and_number(module: Any, symbol: str) -> None:
    """Make everything internal except one function, so that what it does not need is dropped and the rest inlined.

    Internal names become numbers: Numba's contain addresses of this process. Square roots become an instruction; as
    calls of the C library they would set errno.
    """
    for number, value in enumerate([*module.functions, *module.global_variables]):
        if value.name in ("sqrt", "sqrtf"):
            value.name = f"llvm.sqrt.{'f32' if value.name == 'sqrtf' else 'f64'}"
        elif not value.is_declaration and value.name != symbol:
            value.linkage = "internal"
            value.name = f"internal_{number}"


def main() -> None:
    sys.stdout.buffer.write(compile_entry_point(Request(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
