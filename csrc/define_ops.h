// Python's view of a table of kernels: one function an op, which fills the op's struct of params.h and launches.
//
// Such a function takes the op's argument object, a named tuple, then where it runs (the number of threads, or the
// stream), then keywords. Every field of the struct is filled by name, from the keyword or else from the argument that
// is called so:
//
// - a pointer from a tensor, or from None;
// - the strides, the dtype and the bytes that follow a pointer (`<tensor>_…_stride`, `<tensor>_dtype`,
//   `<tensor>_bytes`) from the same tensor;
// - `scratch` from a function that makes a tensor of so many bytes; it is called if the kernel needs any.
//
// A tensor is whatever has data_ptr(), stride(), dtype and nbytes. Included once per module, behind a header that gives
// Kernels, kernels(), Where, where_of() and, for kernels that need scratch memory, scratch_bytes().
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "philox.h"
#include "program.h"

namespace py = pybind11;
using namespace speculative_mamba;

namespace {

struct Field {
    enum Source { value, scratch, stride, dtype, bytes };  // the last three are of the tensor before
    py::str name;
    Source source = value;
    int dimension = 0;  // of a stride
};

inline bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Throws unless the fields that are named cover the struct.
template <typename Params>
void check_cover(const std::vector<Field>& fields) {
    Params params{};
    const auto begin = reinterpret_cast<uintptr_t>(&params);
    uintptr_t end = begin;
    size_t count = 0;
    bool covered = true;
    const auto advance = [&](uintptr_t at, size_t size, size_t alignment) {
        covered = covered && at >= end && at - end < alignment;
        end = at + size, count++;
    };
    params.visit([&](auto&... member) {
        (advance(reinterpret_cast<uintptr_t>(&member), sizeof member, alignof(decltype(member))), ...);
    });
    if (!covered || begin + sizeof params - end >= alignof(Params) || count != fields.size())
        throw std::logic_error(std::string("csrc/params.h: these are not all fields, in order: ") + Params::kFields);
}

template <typename Params>
std::vector<Field> make_fields() {
    std::vector<bool> is_pointer;
    Params().visit([&](auto&... member) {
        (is_pointer.push_back(std::is_pointer_v<std::remove_reference_t<decltype(member)>>), ...);
    });
    std::vector<Field> fields;
    std::string name, tensor;
    int strides = 0;
    for (std::istringstream names(Params::kFields); std::getline(names >> std::ws, name, ',');) {
        name = name.substr(name.find('.') + 1);  // of a struct within, its own name
        Field field;
        field.name = py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str()));
        if (is_pointer.at(fields.size())) {
            tensor = name, strides = 0;
            if (name == "scratch") field.source = Field::scratch;
        } else if (!tensor.empty() && name.compare(0, tensor.size() + 1, tensor + "_") == 0) {
            if (name == tensor + "_dtype") field.source = Field::dtype;
            if (name == tensor + "_bytes") field.source = Field::bytes;
            if (ends_with(name, "_stride")) field.source = Field::stride, field.dimension = strides++;
        }
        fields.push_back(std::move(field));
    }
    check_cover<Params>(fields);
    return fields;
}

// The result of a call of Python's, or its error.
inline py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// What is asked of tensors.
struct TensorNames {
    py::str data_ptr{"data_ptr"}, stride{"stride"}, dtype{"dtype"}, nbytes{"nbytes"};
};
inline const TensorNames& of_tensor() {
    static const TensorNames& names = *new TensorNames;  // outlives the interpreter
    return names;
}
inline py::object call(const py::object& tensor, const py::str& method) {
    return checked(PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr()));
}
inline py::object get(py::handle object, const py::str& name) {
    return checked(PyObject_GetAttr(object.ptr(), name.ptr()));
}

// By what comes behind the dot of "torch.float32".
inline DType dtype_of(py::handle dtype) {
    static std::vector<std::pair<py::object, DType>>& known = *new std::vector<std::pair<py::object, DType>>;
    for (const auto& [object, code] : known)
        if (object.is(dtype)) return code;
    const std::string name = py::str(dtype);
    for (int code = 0; code < static_cast<int>(std::size(kDTypes)); code++) {
        if (!ends_with(name, std::string(".") + kDTypes[code])) continue;
        known.emplace_back(py::reinterpret_borrow<py::object>(dtype), static_cast<DType>(code));
        return static_cast<DType>(code);
    }
    throw std::invalid_argument("kernels do not know dtype " + name);
}

// The fields of an op, and where they are in its argument object.
class Fields {
 public:
    explicit Fields(std::vector<Field> fields) : fields_(std::move(fields)), places_(fields_.size()) {}

    const Field& operator[](size_t i) const { return fields_[i]; }

    // What each field is filled from: null where there is neither a keyword nor an argument.
    std::vector<PyObject*> values(const py::tuple& arguments, const py::kwargs& keywords) {
        if (!type_.is(py::type::handle_of(arguments))) find_places(arguments);
        std::vector<PyObject*> values(fields_.size());
        for (size_t i = 0; i < values.size(); i++)
            if (places_[i] >= 0) values[i] = PyTuple_GET_ITEM(arguments.ptr(), places_[i]);
        size_t expected = 0;  // keywords mostly come in order
        for (const auto& [name, value] : keywords) {
            const size_t i = find(name, expected);
            values[i] = value.ptr(), expected = i + 1;
        }
        return values;
    }

 private:
    void find_places(const py::tuple& arguments) {
        const py::list names(arguments.attr("_fields"));
        for (size_t i = 0; i < fields_.size(); i++) {
            places_[i] = -1;
            for (size_t place = 0; place < names.size(); place++)
                if (fields_[i].name.equal(names[place])) places_[i] = static_cast<int>(place);
        }
        type_ = py::type::of(arguments);
    }

    size_t find(py::handle name, size_t expected) const {
        const auto is_filled = [&](size_t i) { return fields_[i].source <= Field::scratch; };
        for (size_t i = expected; i < fields_.size(); i++)
            if (fields_[i].name.is(name) && is_filled(i)) return i;
        for (size_t i = 0; i < fields_.size(); i++)
            if (fields_[i].name.equal(name) && is_filled(i)) return i;
        throw py::type_error("no field takes the keyword '" + std::string(py::str(name)) + "'");
    }

    std::vector<Field> fields_;
    py::object type_;
    std::vector<int> places_;
};

template <typename Params>
class Filler {
 public:
    Filler(Fields& fields, const py::tuple& arguments, const py::kwargs& keywords)
        : values_(fields.values(arguments, keywords)) {
        params_.visit([&](auto&... member) { ((fill(member, fields[at_]), at_++), ...); });
    }

    const Params& params() const { return params_; }

 private:
    py::object value_of(const Field& field) {
        PyObject* value = values_[at_];
        if (!value) throw py::type_error("nothing fills the field '" + std::string(field.name) + "'");
        return py::reinterpret_borrow<py::object>(value);
    }

    template <typename T>
    void fill(T*& member, const Field& field) {
        tensor_ = value_of(field), strides_ = py::object();
        if (field.source == Field::scratch) {
            needed_ = scratch_bytes(params_);
            if (PyCallable_Check(tensor_.ptr())) tensor_ = needed_ > 0 ? tensor_(needed_) : py::none();
        }
        if (tensor_.is_none()) return;
        member = static_cast<T*>(PyLong_AsVoidPtr(call(tensor_, of_tensor().data_ptr).ptr()));
        if (!member && PyErr_Occurred()) throw py::error_already_set();
    }

    void fill(int64_t& member, const Field& field) {
        if (field.source == Field::value) {
            member = integral(value_of(field));
        } else if (field.source == Field::bytes) {
            if (!tensor_.is_none()) member = integral(get(tensor_, of_tensor().nbytes));
            if (member < needed_)
                throw std::invalid_argument(std::string(field.name) + " is " + std::to_string(member) +
                                            ", but the kernel needs " + std::to_string(needed_));
        } else if (!tensor_.is_none()) {
            if (!strides_) strides_ = call(tensor_, of_tensor().stride);
            member = integral(checked(PySequence_GetItem(strides_.ptr(), field.dimension)));
        }
    }

    void fill(int& member, const Field& field) { member = static_cast<int>(integral(value_of(field))); }

    void fill(DType& member, const Field& field) {
        if (field.source == Field::dtype && tensor_.is_none()) return;
        member = dtype_of(field.source == Field::dtype ? get(tensor_, of_tensor().dtype) : value_of(field));
    }

    void fill(bool& member, const Field& field) {
        const int truth = PyObject_IsTrue(value_of(field).ptr());
        if (truth < 0) throw py::error_already_set();
        member = truth != 0;
    }

    void fill(float& member, const Field& field) {
        const double number = PyFloat_AsDouble(value_of(field).ptr());
        if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
        member = static_cast<float>(number);
    }

    static int64_t integral(const py::object& number) {
        const int64_t value = PyLong_AsLongLong(number.ptr());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }

    Params params_{};
    std::vector<PyObject*> values_;
    size_t at_ = 0;                // the field that is being filled
    py::object tensor_, strides_;  // of the last pointer
    int64_t needed_ = 0;
};

template <typename Params>
void define(py::module_& m, const char* name, void (*Kernels::*kernel)(const Params&, Where)) {
    Fields& fields = *new Fields(make_fields<Params>());  // outlives the interpreter
    m.def(name, [kernel, &fields](const py::tuple& arguments, intptr_t where, const py::kwargs& keywords) {
        const Filler<Params> filler(fields, arguments, keywords);
        py::gil_scoped_release release;
        const auto launch = [kernel, params = filler.params()](intptr_t place) {
            (kernels().*kernel)(params, where_of(place));
        };
        Program::submit(launch, where);
    });
}

// The functions of all ops, and Program.
inline void define_ops(py::module_& m) {
#define SM_DEFINE(op, Params) define<Params>(m, #op, &Kernels::op);
#define SM_NAME(op, Params) #op,
    SM_FOR_EACH_OP(SM_DEFINE)
    m.attr("ops") = std::vector<std::string>{SM_FOR_EACH_OP(SM_NAME)};
    // What the specification knows too: tests compare them.
    m.attr("MAX_CONV_WIDTH") = kMaxConvWidth;
    m.attr("RECORD_COLUMNS") = static_cast<int>(Record::tokens);
    m.attr("FINISH_REASONS") = static_cast<int>(FinishReason::length);
    m.attr("ROUNDING") = kRounding;
    m.attr("ROW_STATUSES") = static_cast<int>(RowStatus::bad_residual);
    m.attr("PURPOSES") = py::make_tuple(static_cast<int>(Purpose::token), static_cast<int>(Purpose::draft),
                                        static_cast<int>(Purpose::test));
    py::class_<Program, std::shared_ptr<Program>>(m, "Program", py::module_local(),
                                                  "A recorded sequence of kernel calls.")
        .def(py::init<>())
        .def("__len__", &Program::size)
        .def("run", &Program::run, py::call_guard<py::gil_scoped_release>())
        .def_static("record", &Program::record, py::arg("program").none(true));
    m.doc() = "Kernels: op(arguments, threads or stream, **fields of the op's struct in csrc/params.h).";
}

}  // namespace
